"""Time of `compress_model` without calibration, as a ratio to `keras.models.clone_model`.

    python benchmarks/compress_time.py

Prints one row per model (median of interleaved repetitions, CPU time of the process) and, over
chains of convolutions of growing depth, the milliseconds per layer: constant means linear growth.
"""

import gc
import statistics
import time

import keras
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc

CONFIG = {"compression": {"algorithm": "quantization"}}
MODELS = {"ResNet152": 64, "EfficientNetB7": 64}


def chain(depth):
    """Return a model of `depth` blocks convolution, batch norm, ReLU."""
    x = inputs = keras.Input((8, 8, 4))
    for _ in range(depth):
        x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, x)


def seconds(function, *arguments):
    """Return the CPU seconds of one call."""
    gc.collect()
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def measure(model, repeats):
    """Return (clone, compress) medians in CPU seconds, measured in turn."""
    clones, compressions = [], []
    for _ in range(repeats):
        clones.append(seconds(keras.models.clone_model, model))
        compressions.append(seconds(lambda: kc.compress_model(model, CONFIG, verbose=False)))
    return statistics.median(clones), statistics.median(compressions)


def main(repeats: int = 3):
    """Measure and print."""
    console = Console()
    measure(chain(3), 1)  # warm-up: imports and first traces
    table = Table("model", "layers", "clone_model, s", "compress_model, s", "ratio")
    for name, size in MODELS.items():
        model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
        clone, compress = measure(model, repeats)
        cells = (f"{clone:.2f}", f"{compress:.2f}", f"{compress / clone:.2f}")
        table.add_row(name, str(len(model.layers)), *cells)
        del model
        keras.backend.clear_session()
    console.print(table)

    table = Table("blocks", "clone_model, ms/block", "compress_model, ms/block", "ratio")
    for depth in (25, 50, 100, 200):
        clone, compress = measure(chain(depth), repeats)
        cells = (f"{1e3 * clone / depth:.1f}", f"{1e3 * compress / depth:.1f}")
        table.add_row(str(depth), *cells, f"{compress / clone:.2f}")
        keras.backend.clear_session()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
