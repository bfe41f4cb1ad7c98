"""What the tests of the examples share: made-up images and a small network with the right names."""

import pathlib

import keras
import numpy as np
import typer
from keras import layers
from typer.testing import CliRunner

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


def write_cifar10(folder, training=500, test=100):
    """Write made-up images in CIFAR-10's format: so many in each of the files."""
    random = np.random.default_rng(0)
    sizes = {f"data_batch_{i}.bin": training for i in range(1, 6)} | {"test_batch.bin": test}
    for name, count in sizes.items():
        records = random.integers(0, 256, (count, 1 + 3 * 32 * 32), "uint8")
        records[:, 0] %= 10
        records.tofile(folder / name)


def save_small_network(path):
    """Save a network for CIFAR-10's images whose first and last layer are named as ResNet-20's."""
    inputs = keras.Input((32, 32, 3), name="image")
    x = layers.Conv2D(8, 3, strides=4, activation="relu", name="stem_conv")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", name="middle")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    keras.Model(inputs, layers.Dense(10, name="logits")(x)).save(path)


def invoke(main, arguments, monkeypatch):
    """Run the main function of an example as a command; returns typer's result."""
    monkeypatch.setenv("COLUMNS", "130")
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def cells(output, name):
    """Return the numbers of a row of a table as text."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]
