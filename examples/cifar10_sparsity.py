"""Makes ResNet-20 on CIFAR-10 sparse in three ways, each in float and in int8.

    python examples/cifar10_sparsity.py --data cifar-10-batches-bin

Every row is one configuration and one `fit`, from the float model that comes with the examples, for
the same number of epochs. Where matplotlib is installed, the sparsity of every layer over the
epochs is drawn into `sparsity.svg`.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import typer
from cifar10_resnet20 import CHECKPOINT, checked_datasets, evaluate_ir, load_datasets
from rich.console import Console
from sparsity_variants import compare, fit

import keras_compress as kc

BATCH = 128
RATE = 0.01  # learnt masks have a way of 4.6 to go, at most this far in a step of Adam


def main(
    data: Annotated[Path, typer.Option(help="Folder with the CIFAR-10 binary files.")],
    epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=4)] = 12,
    steps: Annotated[int, typer.Option(help="Batches of 128 images per epoch; at most 375.")] = 100,
    checkpoint: Annotated[
        Path, typer.Option(help="The float model.", show_default="examples/checkpoints/")
    ] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("cifar10_sparsity"),
):
    """Train every variant, print one table and draw one figure."""
    _, _, test = checked_datasets(data, BATCH, checkpoint)

    def trained(compression):
        keras.utils.set_random_seed(0)
        train, validation, _ = load_datasets(data, BATCH)
        model = keras.models.load_model(checkpoint, compile=False)
        if compression:
            config = {"compression": compression}
            model = kc.compress_model(model, config, data=train, verbose=False)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, epochs * steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        history = fit(model, train.take(steps), epochs, validation_data=validation, shuffle=False)
        return model, history

    compare(
        trained,
        lambda path: evaluate_ir(path, test),
        epochs,
        work,
        Console(),
        "ResNet-20 on CIFAR-10, 10 000 test images",
    )


if __name__ == "__main__":
    typer.run(main)
