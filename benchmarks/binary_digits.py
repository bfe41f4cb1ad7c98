"""Trains the demo's network on scikit-learn's digits in float, in int8, binary and ternary.

    python benchmarks/binary_digits.py

Every row is one configuration and one `fit`, from the same float model. Needs no download. The
accuracy is that of the OpenVINO IR on the test images, the difference that to the trained model.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.demo import digits_network, ir_classes, load_digits, train

PRETRAINING = 10  # epochs in float, before the variants part
RATE = 5e-3
VARIANTS = {
    "float": None,
    "int8": {"algorithm": "quantization"},
    **{mode: {"algorithm": "binarization", "mode": mode} for mode in ("xnor", "dorefa", "ternary")},
}


def trained(plain, compression, fit_on, validation, epochs):
    """Return a copy of a model, compressed, after its training."""
    keras.utils.set_random_seed(0)
    model = keras.models.clone_model(plain)
    model.set_weights(plain.get_weights())
    callbacks = []
    if compression:
        config = {"compression": compression}
        model = kc.compress_model(model, config, data=fit_on[0], verbose=False)
        callbacks = [kc.callbacks.Compress()]
    train(model, fit_on, validation, epochs, RATE, callbacks)
    return model


def main(epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=1)] = 30):
    """Train every variant and print one table."""
    fit_on, validation, (images, classes) = load_digits()
    keras.utils.set_random_seed(0)
    plain = digits_network()
    train(plain, fit_on, validation, PRETRAINING, 2e-3)
    table = Table(
        "", "accuracy of the IR", ".bin, bytes", "in 8 bits", "IR - trained, of its range"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, compression in VARIANTS.items():
            model = trained(plain, compression, fit_on, validation, epochs)
            path = Path(folder) / f"{name}.xml"
            kc.export(model, path, verify=False)
            report = kc.verify(model, path, data=images, samples=len(images))
            table.add_row(
                name,
                f"{np.mean(ir_classes(path, images) == classes):.2%}",
                f"{path.with_suffix('.bin').stat().st_size:,}",
                f"{report.eight_bit_layers} of {len(report.layers)}",
                f"{report.relative:.1e}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
