"""Prunes and quantizes a network on scikit-learn's digits as far as an accuracy budget allows.

    python examples/digits_accuracy_aware.py

A float network is trained first. Then `accuracy_aware_fit` moves the pruning level, with
quantization to 8 bits alongside: as high as accuracy on 450 images stays within half a point of the
float network's. Needs no download. A run that was ended goes on where it was.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.demo import digits_network, ir_classes, load_digits

BATCH = 32
PRETRAINING = 15  # epochs in float
POINTS = 0.005  # of validation accuracy that may be lost: two images of 450
TRAINING = 900  # images; as the others choose the rate, there shall be many of them


def config(epochs):
    """Return the configuration for so many epochs in all."""
    return {
        "target_device": "CPU",
        "compression": [
            {
                "algorithm": "filter_pruning",
                "params": {
                    "pruning_target": 0.5,
                    "pruning_steps": 3,
                    "prune_first_conv": True,
                    "prune_downsample_convs": True,
                    "round_to": 4,
                },
            },
            {"algorithm": "quantization"},
        ],
        "accuracy_aware_training": {
            "mode": "adaptive_compression_level",
            "params": {
                "maximal_absolute_accuracy_degradation": POINTS,
                "initial_training_phase_epochs": 4,
                "patience_epochs": 2,
                "maximal_total_epochs": epochs,
            },
        },
    }


def compiled(model, rate):
    """Compile a model with Adam."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def split():
    """Return the images and classes to train, to validate and to test with."""
    (images, classes), validation, test = load_digits()
    rest = (images[TRAINING:], classes[TRAINING:])
    validation = tuple(np.concatenate(pair) for pair in zip(rest, validation, strict=True))
    return (images[:TRAINING], classes[:TRAINING]), validation, test


def main(
    epochs: Annotated[int, typer.Option(help="Epochs at most.", min=1)] = 40,
    out: Annotated[Path, typer.Option(help="Folder for the IR and the figure.")] = Path("demo"),
):
    """Train, compress within the budget, export, print the tables and draw the figure."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    fit_on, validation, test = split()
    keras.utils.set_random_seed(0)
    plain = compiled(digits_network(), 2e-3)
    with console.status("float model"):
        plain.fit(*fit_on, BATCH, PRETRAINING, verbose=0)
    model = compiled(kc.compress_model(plain, config(epochs), fit_on[0], verbose=False), 1e-3)
    result = kc.accuracy_aware_fit(
        model,
        *fit_on,
        validation_data=validation,
        baseline=plain,
        batch_size=BATCH,
        folder=out / "accuracy_aware",
    )
    console.print(result)
    kc.draw_accuracy(result, out / "accuracy_aware.svg")

    table = Table("", "test accuracy, IR", "parameters", ".bin, bytes")
    models = {"float": plain, "pruned to the bound, int8": kc.strip(model)}
    for index, (name, each) in enumerate(models.items()):
        path = out / f"accuracy_aware_{index}.xml"
        kc.export(each, path, verify=False)
        right = np.mean(ir_classes(path, test[0]) == test[1])
        size = path.with_suffix(".bin").stat().st_size
        table.add_row(name, f"{right:.2%}", f"{each.count_params():,}", f"{size:,}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
