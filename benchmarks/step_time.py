"""Cost of a quantized training step, as a ratio to the float step of the same network.

    python benchmarks/step_time.py [--blocks 15] [--steps 4]

Both models live in one process; blocks of steps alternate between them, and CPU time (all threads
of the process) and wall time are compared block by block. Peak memory is that of a process of its
own per variant, after four steps (Linux).
"""

import concurrent.futures
import multiprocessing
import pathlib
import re
import statistics
import sys
import time

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

BATCH = 64
NETWORKS = {"ResNet-20, 32x32": 32, "MobileNetV2 0.5, 96x96": 96}


def compiled(network, quantized):
    """Return (model ready to train, inputs, labels)."""
    import keras
    import numpy as np

    import keras_compress as kc

    size = NETWORKS[network]
    rng = np.random.default_rng(0)
    data = rng.normal(size=(BATCH, size, size, 3)).astype("float32")
    labels = rng.integers(0, 10, BATCH)
    if network.startswith("ResNet"):
        from cifar10_resnet20 import resnet20

        model = resnet20()
    else:
        model = keras.applications.MobileNetV2(
            (size, size, 3), alpha=0.5, weights=None, classes=10, classifier_activation=None
        )
    if quantized:
        config = {"compression": {"algorithm": "quantization"}}
        model = kc.compress_model(model, config, data=data, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss)
    return model, data, labels


def block(model, data, labels, steps):
    """Return (CPU seconds, wall seconds) per step of a block."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        model.train_on_batch(data, labels)
    return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def time_ratios(network, blocks, steps):
    """Return the ratios (CPU, wall) quantized / float: medians over pairs of blocks."""
    models = [compiled(network, quantized) for quantized in (False, True)]
    for model in models:
        block(*model, 2)  # traces
    times = [[block(*model, steps) for model in models] for _ in range(blocks)]
    return [
        statistics.median(quantized[i] / plain[i] for plain, quantized in times) for i in (0, 1)
    ]


def peak_memory(network, quantized):
    """Return the peak resident memory of this process after four steps, in KiB."""
    block(*compiled(network, quantized), 4)
    # Not `getrusage`: its peak is inherited from the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


def memory_ratio(network):
    """Return peak memory quantized / float, each in a fresh process."""
    peaks = []
    for quantized in (False, True):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            peaks.append(pool.submit(peak_memory, network, quantized).result())
    return peaks[1] / peaks[0]


def main(blocks: int = 15, steps: int = 4, threads: int = 0):
    """Measure and print."""
    import tensorflow as tf

    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    table = Table("network", "CPU time", "wall time", "peak memory")
    for network in NETWORKS:
        cpu, wall = time_ratios(network, blocks, steps)
        table.add_row(network, f"{cpu:.3f}", f"{wall:.3f}", f"{memory_ratio(network):.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
