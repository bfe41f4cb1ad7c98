"""Trains ResNet-20 on CIFAR-10 with fewer and fewer bits, from one float model.

    python examples/cifar10_low_bit.py --data cifar-10-batches-bin

Every row is one configuration and one `fit` of the same length. First and last layer keep 8 bits.
It can be interrupted: the same command carries on after the last finished row.
"""

import json
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import typer
from cifar10_resnet20 import (
    CHECKPOINT,
    checked_datasets,
    compile_model,
    evaluate_ir,
    fit,
    load_datasets,
    measure_latency,
)
from rich.console import Console
from rich.table import Table

import keras_compress as kc

BATCH = 128
PEAK = 0.03
FEWEST = 4  # epochs: binary networks switch activations on first, weights after them


def quantization(weights=8, activations=8, **initializer):
    """Returns quantization to some widths, with 8 bits for the first and the last layer."""
    eight = {"bits": 8}
    return {
        "algorithm": "quantization",
        "weights": {"bits": weights},
        "activations": {"bits": activations},
        "scope_overrides": {
            "weights": {"stem_conv": eight, "logits": eight},
            "activations": {"image": eight, "pool": eight},
        },
        "initializer": initializer,
    }


def variants(epochs):
    """Returns {name: the configuration, or None for float}."""
    staged = {"activations_quant_start_epoch": 0, "weights_quant_start_epoch": epochs // 4}
    mixed = {"type": "hawq", "bits": [4, 8], "compression_ratio": 1.5, "num_data_points": 256}
    algorithms = {
        "W8A8": quantization(),
        "W4A8": quantization(weights=4),
        "W4A4": quantization(weights=4, activations=4),
        "mixed 4/8, 1.5x": quantization(precision=mixed),
        "W2A8": quantization(weights=2),
        "ternary": {"algorithm": "binarization", "mode": "ternary"},
        "xnor": {"algorithm": "binarization", "mode": "xnor", "params": staged},
        "dorefa": {"algorithm": "binarization", "mode": "dorefa", "params": staged},
    }
    return {"float": None} | {
        name: {"compression": [algorithm]} for name, algorithm in algorithms.items()
    }


class Training:
    """What all trainings share.

    Args:
        data: folder with the data.
        checkpoint: the float model.
        epochs: of one training.
        steps: batches per epoch.
        work: folder for the results.
    """

    def __init__(self, data, checkpoint, epochs, steps, work):
        self.data, self.checkpoint, self.work = data, checkpoint, work
        self.epochs, self.steps = epochs, steps

    def run(self, name, config):
        """Trains and exports one variant; returns its figures."""
        keras.utils.set_random_seed(0)
        train, validation, test = load_datasets(self.data, BATCH)
        model = keras.models.load_model(self.checkpoint, compile=False)
        self.compile(model)  # the search for widths differentiates the loss
        callbacks = []
        if config:
            model = kc.compress_model(model, config, data=train, verbose=False)
            self.compile(model)
            callbacks = [kc.callbacks.Compress()]
        fit(model, train.take(self.steps), validation, self.epochs, callbacks)
        report = kc.export(model, self.path(name))
        return {
            "trained": self.epochs * self.steps,
            "keras": model.evaluate(test, verbose=0, return_dict=True)["accuracy"],
            "ir": evaluate_ir(self.path(name), test),
            "bytes": self.path(name).with_suffix(".bin").stat().st_size,
            "difference": report.relative,
            "eight_bit": f"{report.eight_bit_layers} of {len(report.layers)}",
        }

    def compile(self, model):
        """Compiles a model for all epochs."""
        steps = self.epochs * self.steps
        compile_model(model, PEAK, steps, warmup=steps // 50)

    def path(self, name):
        """Returns the path of a variant's IR."""
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        return self.work / f"{plain}.xml"


def table_of(results, latencies):
    """Returns the table of {name: figures}, and the latency of each IR."""
    columns = (
        "",
        "accuracy, Keras",
        "accuracy, IR",
        "IR - Keras, of range",
        ".bin, bytes",
        "of W8A8",
        "latency, ms",
        "in 8 bits",
    )
    table = Table(*columns, title="ResNet-20 on CIFAR-10, 10 000 test images")
    for (name, each), latency in zip(results.items(), latencies, strict=True):
        table.add_row(
            name,
            f"{each['keras']:.2%}",
            f"{each['ir']:.2%}",
            f"{each['difference']:.1e}",
            f"{each['bytes']:,}",
            f"{each['bytes'] / results['W8A8']['bytes']:.2f}",
            f"{latency:.3f}",
            each["eight_bit"],
        )
    return table


def main(
    data: Annotated[Path, typer.Option(help="Folder with the CIFAR-10 binary files.")],
    epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=FEWEST)] = 8,
    steps: Annotated[int, typer.Option(help="Batches of 128 images per epoch; at most 375.")] = 100,
    checkpoint: Annotated[
        Path, typer.Option(help="The float model.", show_default="examples/checkpoints/")
    ] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("cifar10_low_bit"),
):
    """Train every variant and print one table."""
    checked_datasets(data, BATCH, checkpoint)
    work.mkdir(parents=True, exist_ok=True)
    training = Training(data, checkpoint, epochs, steps, work)
    store = work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for name, config in variants(epochs).items():
        if results.get(name, {}).get("trained") != epochs * steps:
            results[name] = training.run(name, config)
            store.write_text(json.dumps(results, indent=2) + "\n")
    latencies = measure_latency([training.path(name) for name in results])
    Console(width=130).print(table_of(results, latencies))


if __name__ == "__main__":
    typer.run(main)
