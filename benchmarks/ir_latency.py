"""Our int8 IR beside the float IR and NNCF's post-training int8 IR of the same float model.

    python benchmarks/ir_latency.py [--models ResNet50,MobileNetV2] [--size 224]

Random weights; batch-norm statistics are made real on random data first. Our model is compressed,
trained one step, stripped, exported and verified; NNCF quantizes our float IR with the same data.
Columns: the largest difference between the IR and the trained model as a share of the output
range; the same between the trained model and itself compiled by XLA, which adds the same numbers
in another order: no exported file can be nearer than that to both; layers with weights that run
in 8 bits, ours and NNCF's; sizes of the .bin as ratios to the float32 one; latencies as ratios,
measured in one run, interleaved.
"""

import pathlib
import tempfile

import keras
import nncf
import numpy as np
import openvino as ov
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.export.benchmark import benchmark
from keras_compress.export.precisions import layer_precisions
from keras_compress.export.verify import agreement, compile_on_cpu
from keras_compress.training.batch_norm import adapt_batch_norm

CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {
            "range": {"num_init_samples": 32},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 32},
        },
    },
}
MODELS = "MobileNetV2,ResNet50,InceptionV3,EfficientNetB0,DenseNet121"


def float_model(name, size, data):
    """Return a model of keras.applications with random weights and real batch-norm statistics."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3))
    adapt_batch_norm(model, [[data[start : start + 8]] for start in range(0, len(data), 8)])
    return model


def trained_int8(model, data):
    """Return the compressed model after one training step."""
    compressed = kc.compress_model(model, CONFIG, data=data, verbose=False)
    compressed.compile(keras.optimizers.SGD(1e-4), "sparse_categorical_crossentropy")
    compressed.train_on_batch(data[:8], np.arange(8))
    return compressed


def own_spread(model, images):
    """Return how far the model compiled by XLA is from itself, as a share of the output range."""
    import tensorflow as tf

    plain = model.predict(images, verbose=0)
    reordered = tf.function(model, jit_compile=True)(images, training=False)
    return agreement(model.name, plain, reordered).relative


def nncf_ir(path, target, data):
    """Quantize a float IR after training, NNCF's default for mixed convolutional networks."""
    dataset = nncf.Dataset([sample[None] for sample in data])
    quantized = nncf.quantize(ov.Core().read_model(path), dataset, subset_size=len(data))
    ov.save_model(quantized, target, compress_to_fp16=False)


def count_8_bit(path):
    """Return (layers with weights in 8 bits, layers with weights) of an IR as executed."""
    layers = layer_precisions(compile_on_cpu(ov.Core(), path))
    return sum(layer.eight_bit for layer in layers), len(layers)


def row(name, size, folder, calls):
    """Return the table cells of one model."""
    scale = 255.0 if "EfficientNet" in name else 1.0
    data = scale * np.random.default_rng(0).random((32, size, size, 3)).astype("float32")
    model = float_model(name, size, data)
    paths = {kind: folder / f"{name}_{kind}.xml" for kind in ("float", "int8", "nncf")}
    kc.export(model, paths["float"], verify=False)
    compressed = trained_int8(model, data)
    stripped = kc.strip(compressed)
    kc.export(stripped, paths["int8"], verify=False)
    report = kc.verify(compressed, paths["int8"], data=data[:8])
    nncf_ir(paths["float"], paths["nncf"], data)
    sizes = {kind: path.with_suffix(".bin").stat().st_size for kind, path in paths.items()}
    timed = benchmark(list(paths.values()), calls=calls).latencies
    latency = {kind: result.median for kind, result in zip(paths, timed, strict=True)}
    ours, theirs = count_8_bit(paths["int8"]), count_8_bit(paths["nncf"])
    return [
        name,
        f"{report.relative:.1e}",
        f"{own_spread(compressed, data[:8]):.1e}",
        f"{ours[0]}/{ours[1]}",
        f"{theirs[0]}/{theirs[1]}",
        f"{sizes['int8'] / sizes['float']:.3f}",
        f"{sizes['nncf'] / sizes['float']:.3f}",
        f"{latency['int8'] / latency['float']:.2f}",
        f"{latency['int8'] / latency['nncf']:.2f}",
    ]


def main(models: str = MODELS, size: int = 224, calls: int = 200):
    """Measure and print."""
    table = Table(
        "model",
        "IR - trained, of range",
        "trained, XLA - plain",
        "8-bit layers",
        "8-bit layers, NNCF",
        ".bin / float",
        "NNCF .bin / float",
        "latency / float",
        "latency / NNCF",
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(","):
            table.add_row(*row(name, size, pathlib.Path(folder), calls))
            keras.backend.clear_session()
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
