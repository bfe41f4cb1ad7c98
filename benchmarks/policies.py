"""Trains the demo's network on scikit-learn's digits, pruned and in int8, under several policies.

    python benchmarks/policies.py

Every row is one dtype policy and one way of compiling, and one `fit` from the same float model.
Needs no download. Weights are float32 under all of these policies, so each run begins with the
same ones. The goal: no row's IR is more than one point of accuracy below that of float32.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.demo import BATCH, digits_network, ir_classes, load_digits, train

PRETRAINING = 10  # epochs in float, before the variants part
RATE = 2e-3
ALLOWED = 0.01  # loss of accuracy against float32
COMPRESSION = [
    {
        "algorithm": "filter_pruning",
        "params": {"pruning_target": 0.3, "pruning_steps": 4, "prune_first_conv": True},
    },
    {"algorithm": "quantization"},
]
VARIANTS = {  # name -> (dtype policy, arguments of `compile`)
    "float32": ("float32", {"jit_compile": False}),
    "float32, XLA": ("float32", {"jit_compile": True}),
    "float32, 4 steps per execution": (
        "float32",
        {"jit_compile": False, "steps_per_execution": 4},
    ),
    "mixed_bfloat16": ("mixed_bfloat16", {"jit_compile": False}),
    "mixed_bfloat16, XLA": ("mixed_bfloat16", {"jit_compile": True}),
    "mixed_float16": ("mixed_float16", {"jit_compile": False}),
}


class Result(NamedTuple):
    """Accuracy of a trained model, that of its IR, and how far apart their outputs are."""

    trained: float
    deployed: float
    difference: float


def trained(plain, policy, arguments, fit_on, validation, epochs):
    """Return the float model compressed and trained under a policy."""
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = digits_network()
        model.set_weights(plain.get_weights())
        config = {"compression": COMPRESSION}
        model = kc.compress_model(model, config, data=fit_on[0], verbose=False)
        steps = epochs * -(-len(fit_on[0]) // BATCH)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **arguments,
        )
        callbacks = [kc.callbacks.Compress()]
        model.fit(
            *fit_on, BATCH, epochs, verbose=0, validation_data=validation, callbacks=callbacks
        )
    finally:
        keras.config.set_dtype_policy(before)
    return model


def measured(model, path, images, classes):
    """Export a model and return its `Result` on the test images."""
    kc.export(model, path, verify=False)
    report = kc.verify(model, path, data=images, samples=len(images))
    own = model.predict(images, verbose=0).argmax(axis=1)
    deployed = ir_classes(path, images)
    return Result(np.mean(own == classes), np.mean(deployed == classes), report.relative)


def compare(names=tuple(VARIANTS), epochs=12, pretraining=PRETRAINING):
    """Train the variants with these names; returns {name: `Result`}."""
    fit_on, validation, test = load_digits()
    keras.utils.set_random_seed(0)
    plain = digits_network()
    train(plain, fit_on, validation, pretraining, 2e-3)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            model = trained(plain, *VARIANTS[name], fit_on, validation, epochs)
            results[name] = measured(model, Path(folder) / f"{index}.xml", *test)
    return results


def main(epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=5)] = 12):
    """Train every variant and print one table."""
    results = compare(epochs=epochs)
    table = Table(
        "", "accuracy, trained", "accuracy, IR", "IR against float32", "IR - trained, of its range"
    )
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.trained:.2%}",
            f"{result.deployed:.2%}",
            f"{100 * (result.deployed - results['float32'].deployed):+.2f} points",
            f"{result.difference:.1e}",
        )
    Console().print(table)
    worst = min(results.values(), key=lambda result: result.deployed)
    if worst.deployed < results["float32"].deployed - ALLOWED:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
