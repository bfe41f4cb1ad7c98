"""Makes a network on scikit-learn's digits sparse in three ways, each in float and in int8.

    python examples/digits_sparsity.py

Every row is one configuration and one `fit`, from the same float model, for the same number of
epochs. Needs no download. Where matplotlib is installed, the sparsity of every layer over the
epochs is drawn into `sparsity.svg`.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import typer
from rich.console import Console
from sparsity_variants import compare, fit

import keras_compress as kc
from keras_compress.demo import digits_network, ir_classes, load_digits

PRETRAINING = 10  # epochs in float, before the variants part
BATCH = 32
RATE = 0.02  # learnt masks have a way of 4.6 to go, at most this far in a step of Adam


def train(model, data, epochs, rate):
    """Trains with Adam and a cosine schedule; returns the history."""
    images, classes = data
    steps = epochs * -(-len(images) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return fit(model, images, epochs, y=classes, batch_size=BATCH)


def main(
    epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=4)] = 30,
    out: Annotated[Path, typer.Option(help="Folder for the IRs and the figure.")] = Path("demo"),
):
    """Train every variant, print one table and draw one figure."""
    console = Console()
    fit_on, _, (images, classes) = load_digits()
    keras.utils.set_random_seed(0)
    plain = digits_network()
    with console.status("float model"):
        train(plain, fit_on, PRETRAINING, 2e-3)

    def trained(compression):
        keras.utils.set_random_seed(0)
        model = keras.models.clone_model(plain)
        model.set_weights(plain.get_weights())
        if compression:
            config = {"compression": compression}
            model = kc.compress_model(model, config, data=fit_on[0], verbose=False)
        return model, train(model, fit_on, epochs, RATE)

    def accuracy(path):
        return float(np.mean(ir_classes(path, images) == classes))

    compare(trained, accuracy, epochs, out, console, "digits")


if __name__ == "__main__":
    typer.run(main)
