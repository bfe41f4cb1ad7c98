"""Trains compressed networks with and without the original as their teacher, three seeds each.

    python examples/distillation.py
    python examples/distillation.py --data cifar-10-batches-bin

Without `--data` the network of the demo on scikit-learn's digits, which needs no download; with it
ResNet-20 on CIFAR-10, from the float model beside this file. Every row is one configuration, for
the same number of epochs from the same float model. It can be interrupted: the same command goes
on after the last finished training.
"""

import json
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import typer
from cifar10_resnet20 import CHECKPOINT, checked_datasets, compile_model
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.demo import digits_network, load_digits, train

BATCH = 128
PEAK = 0.03
PRETRAINING = 15  # epochs in float, on the digits
ALGORITHMS = {
    "4 bits": {
        "algorithm": "quantization",
        "weights": {"bits": 4},
        "activations": {"bits": 4},
    },
    "60 % pruned": {
        "algorithm": "filter_pruning",
        "params": {
            "pruning_target": 0.6,
            "schedule": "baseline",
            "round_to": 4,
            "prune_first_conv": True,
            "prune_downsample_convs": True,
        },
    },
}
SOFT = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 4}
RELU = {"target_scopes": ["{re}re_?lu"]}
TEACHERS = {"alone": None, "outputs": SOFT, "outputs and features": SOFT | {"features": RELU}}


class Digits:
    """The demo's network on scikit-learn's digits."""

    title = "digits"

    def __init__(self, epochs):
        self.epochs = epochs or 3
        self.images, validation, test = load_digits()
        self.validation = validation
        self.test = tuple(np.concatenate(pair) for pair in zip(validation, test, strict=True))
        keras.utils.set_random_seed(0)
        self.model = digits_network()
        train(self.model, self.images, validation, PRETRAINING, 2e-3)
        self.calibration = self.images[0]

    def fit(self, model):
        """Trains a compressed model."""
        callbacks = [kc.callbacks.Compress()]
        train(model, self.images, self.validation, self.epochs, 1e-3, callbacks)

    def accuracy(self, model):
        """Returns the accuracy on images that took no part in training."""
        return float(np.mean(model.predict(self.test[0], verbose=0).argmax(1) == self.test[1]))


class Cifar10:
    """ResNet-20 on CIFAR-10, from the float model beside this file."""

    title = "CIFAR-10, ResNet-20"

    def __init__(self, data, epochs, steps):
        self.epochs, self.steps = epochs or 8, steps
        self.train, _, self.test = checked_datasets(data, BATCH, CHECKPOINT)
        self.model = keras.models.load_model(CHECKPOINT, compile=False)
        self.calibration = self.train.take(8)

    def fit(self, model):
        """Trains a compressed model; what is pruned is taken out as soon as that is decided."""
        compile_model(model, PEAK, self.epochs * self.steps, warmup=self.steps // 10)
        batches = self.train.repeat().take(self.epochs * self.steps)
        model.fit(
            batches,
            epochs=self.epochs,
            steps_per_epoch=self.steps,
            callbacks=[kc.callbacks.Compress(shrink=True)],
            shuffle=False,
            verbose=2,
        )

    def accuracy(self, model):
        """Returns the accuracy on the test images."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(loss=loss, metrics=["accuracy"])
        return float(model.evaluate(self.test, verbose=0, return_dict=True)["accuracy"])


def trained_accuracy(task, algorithm, teacher, seed):
    """Compresses and trains once; returns the accuracy."""
    keras.utils.set_random_seed(seed)
    config = {"compression": [algorithm] + ([teacher] if teacher else [])}
    model = kc.compress_model(task.model, config, data=task.calibration, verbose=False)
    task.fit(model)
    return task.accuracy(model)


def table_of(task, accuracy, seeds):
    """Returns the table: one row for each way to learn, one column for each seed."""
    names = [f"seed {seed}" for seed in range(seeds)]
    title = f"{task.title}: accuracy after {task.epochs} epochs"
    table = Table("", *names, "mean", title=title, title_justify="left")
    plain = f"{accuracy['float']:.2%}"
    table.add_row("float", *[""] * seeds, plain, end_section=True)
    for name in ALGORITHMS:
        for way in TEACHERS:
            found = [accuracy.get(f"{name}, {way}, {seed}") for seed in range(seeds)]
            if None not in found:
                cells = [f"{value:.2%}" for value in [*found, float(np.mean(found))]]
                label = "labels" if way == "alone" else f"and teacher's {way}"
                table.add_row(f"{name}: {label}", *cells, end_section=way == list(TEACHERS)[-1])
    return table


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with CIFAR-10's binary files; None: digits.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of every training: 3 on digits, 8 on CIFAR-10.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches in an epoch of CIFAR-10.")] = 100,
    seeds: Annotated[int, typer.Option(help="Trainings of every row.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for what is done so far.")] = Path("demo"),
):
    """Train every row with every seed, and print one table."""
    console = Console()
    task = Digits(epochs) if data is None else Cifar10(data, epochs, steps)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"distillation_{type(task).__name__.lower()}_{task.epochs}.json"
    accuracy = json.loads(file.read_text()) if file.exists() else {}
    if "float" not in accuracy:
        accuracy["float"] = task.accuracy(task.model)
    for seed in range(seeds):
        for name, algorithm in ALGORITHMS.items():
            for way, teacher in TEACHERS.items():
                key = f"{name}, {way}, {seed}"
                if key not in accuracy:
                    accuracy[key] = trained_accuracy(task, algorithm, teacher, seed)
                    print(f"{key}: {accuracy[key]:.4f}", flush=True)
                    file.write_text(json.dumps(accuracy, indent=2))
    console.print(table_of(task, accuracy, seeds))


if __name__ == "__main__":
    typer.run(main)
