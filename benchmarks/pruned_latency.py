"""How much faster pruning makes the IR, alone and together with int8, in one run.

    python benchmarks/pruned_latency.py --architecture ResNet50 --target 0.5

Weights are random: latency depends on shapes alone.
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

EVERYWHERE = {"prune_first_conv": True, "prune_downsample_convs": True}


def configurations(target, round_to):
    """Return {name: configuration or None} of the models that are compared."""
    params = EVERYWHERE | {"schedule": "baseline", "pruning_flops_target": target}
    params |= {"round_to": round_to}
    pruning = {"algorithm": "filter_pruning", "params": params}
    no_adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    pruning |= {"initializer": no_adaptation}
    quantization = {"algorithm": "quantization", "initializer": no_adaptation}
    return {
        "float": None,
        "pruned": [pruning],
        "int8": [quantization],
        "pruned int8": [pruning, quantization],
    }


def main(
    architecture: Annotated[str, typer.Option(help="Name in keras.applications.")] = "ResNet50",
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
    target: Annotated[float, typer.Option(help="Fraction of FLOPs that goes.")] = 0.5,
    round_to: Annotated[int, typer.Option(help="Channels come in multiples of this.")] = 8,
    calls: Annotated[int, typer.Option(help="Measured calls of each model.")] = 100,
):
    """Export a model in four forms and measure them in turn."""
    shape = (size, size, 3)
    model = getattr(keras.applications, architecture)(weights=None, input_shape=shape)
    data = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    flops = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, compression in configurations(target, round_to).items():
            made = model
            if compression:
                config = {"compression": compression}
                made = kc.strip(kc.compress_model(model, config, data=data, verbose=False))
            flops[name] = kc.report(made).flops
            paths.append(pathlib.Path(folder, f"{name.replace(' ', '_')}.xml"))
            kc.export(made, paths[-1], verify=False)
        latencies = dict(zip(flops, benchmark(paths, calls=calls).latencies, strict=True))
    table = Table(
        "model", "FLOPs", "median ms", "quartiles apart", "shortest ms", "speed-up", box=box.SIMPLE
    )
    for name, latency in latencies.items():
        numbers = (latency.median, latency.spread, latency.fastest)
        reference = latencies["int8" if name == "pruned int8" else "float"]
        speedups = (reference.median / latency.median, reference.fastest / latency.fastest)
        table.add_row(
            name,
            f"{flops[name] / flops['float']:.1%}",
            *(f"{number:.2f}" for number in numbers),
            "{:.2f}x (shortest {:.2f}x)".format(*speedups),
        )
    print(f"{architecture} {size}x{size}; int8 pruned is compared with int8, the others with float")
    print(table)


if __name__ == "__main__":
    typer.run(main)
