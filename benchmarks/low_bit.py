"""What each width buys on this CPU: bytes and milliseconds of the IR, in one run.

    python benchmarks/low_bit.py --architecture ResNet50

Weights are random: bytes and latency depend on shapes and widths alone.
"""

import pathlib
import tempfile
from typing import Annotated

import keras
import numpy as np
import typer
from rich import box, print
from rich.table import Table

import keras_compress as kc
from keras_compress.export.benchmark import benchmark

NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}


def quantization(**groups):
    """Return quantization to the given widths of weights and activations."""
    widths = {group: {"bits": bits} for group, bits in groups.items()}
    return {"algorithm": "quantization", "initializer": NO_ADAPTATION} | widths


def binarization(mode):
    """Return binarization; first and last layer stay 8 bits."""
    return {"algorithm": "binarization", "mode": mode, "initializer": NO_ADAPTATION}


CONFIGURATIONS = {
    "float": None,
    "W8A8": quantization(),
    "W6A8": quantization(weights=6),
    "W4A8": quantization(weights=4),
    "W4A4": quantization(weights=4, activations=4),
    "W3A8": quantization(weights=3),
    "W2A8": quantization(weights=2),
    "W2A2": quantization(weights=2, activations=2),
    "ternary": binarization("ternary"),
    "xnor": binarization("xnor"),
    "dorefa": binarization("dorefa"),
}


def main(
    architecture: Annotated[str, typer.Option(help="Name in keras.applications.")] = "ResNet50",
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
    calls: Annotated[int, typer.Option(help="Measured calls of each model.")] = 100,
    threads: Annotated[int, typer.Option(help="Threads; 0: OpenVINO chooses.")] = 1,
):
    """Export a model in every width and measure all in turn."""
    shape = (size, size, 3)
    model = getattr(keras.applications, architecture)(weights=None, input_shape=shape)
    data = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, algorithm in CONFIGURATIONS.items():
            made = model
            if algorithm:
                config = {"compression": [algorithm]}
                made = kc.compress_model(model, config, data=data, verbose=False)
            paths.append(pathlib.Path(folder, f"{name}.xml"))
            reports[name] = kc.export(made, paths[-1], data=data)
        latencies = dict(
            zip(reports, benchmark(paths, calls=calls, threads=threads).latencies, strict=True)
        )
        sizes = {
            name: path.with_suffix(".bin").stat().st_size
            for name, path in zip(reports, paths, strict=True)
        }
    print(f"{architecture} {size}x{size}, {threads or 'all'} thread(s)")
    print(table_of(reports, sizes, latencies))


def table_of(reports, sizes, latencies):
    """Return the table of all widths; bytes and milliseconds also relative to W8A8."""
    columns = (".bin, MB", "of W8A8", "median ms", "of W8A8", "shortest ms", "of W8A8")
    table = Table("weights, activations", *columns, "in 8 bits", "IR - Keras", box=box.SIMPLE)
    for name, report in reports.items():
        latency, eight = latencies[name], latencies["W8A8"]
        table.add_row(
            name,
            f"{sizes[name] / 1e6:.2f}",
            f"{sizes[name] / sizes['W8A8']:.3f}",
            f"{latency.median:.2f}",
            f"{latency.median / eight.median:.3f}",
            f"{latency.fastest:.2f}",
            f"{latency.fastest / eight.fastest:.3f}",
            f"{report.eight_bit_layers} of {len(report.layers)}",
            f"{report.relative:.1e}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
