"""Makes a network on scikit-learn's digits sparse in four ways, each in float and in int8.

    python examples/digits_sparsity.py

Every row is one configuration and one `fit`, from the same float model, for the same number of
epochs. Needs no download. Where matplotlib is installed, the sparsity of every layer over the
epochs is drawn into `sparsity.svg`.
"""

import importlib.util
import io
import os
import zipfile
from dataclasses import dataclass
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

PRETRAINING = 10  # epochs in float, before the variants part
BATCH = 32
RATE = 0.02  # learnt masks have a way of 4.6 to go, at most this far in a step of Adam
PREFIX = "compression/sparsity/"


def sparsities(epochs):
    """Returns {name: the algorithm's part of the configuration, or None}."""
    course = {"sparsity_target_epoch": epochs // 2, "sparsity_freeze_epoch": epochs * 3 // 4}
    eighty = course | {"sparsity_target": 0.8}
    return {
        "dense": None,
        "magnitude 80 %": {"algorithm": "magnitude_sparsity", "params": eighty | {"power": 3}},
        "RB 80 %": {"algorithm": "rb_sparsity", "params": eighty},
        "2:4": {"algorithm": "magnitude_sparsity", "params": course | {"sparsity_pattern": "2:4"}},
    }


@dataclass(frozen=True)
class Result:
    """What one training came to.

    Attributes:
        accuracy: of the IR on the test images, in [0, 1].
        masked: fraction of the weights that masks switch off; None without masks.
        zeros: fraction of zeros in the kernels of the stripped model.
        size: bytes of the IR's `.bin`.
        zipped: bytes of `.xml` and `.bin`, zipped.
        history: {layer: its sparsity after every epoch}.
    """

    accuracy: float
    masked: float | None
    zeros: float
    size: int
    zipped: int
    history: dict


def train(model, data, epochs, rate):
    """Trains with Adam and a cosine schedule; returns the history, {key: value per epoch}."""
    images, classes = data
    steps = epochs * -(-len(images) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = []
    if isinstance(model, kc.CompressedModel):
        callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    return model.fit(images, classes, BATCH, epochs, verbose=0, callbacks=callbacks).history


def zipped_bytes(path):
    """Returns the bytes of an IR, both files, in a zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as files:
        for part in (path, path.with_suffix(".bin")):
            files.write(part, part.name)
    return len(archive.getvalue())


def zeros_of(model):
    """Returns the fraction of zeros in the kernels of a plain model."""
    layers = (layer for layer in model.layers if hasattr(layer, "kernel"))
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in layers]
    return 1 - sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)


def run(plain, compression, datasets, epochs, path):
    """Compresses a copy of a float model, trains it, exports it, and says what came of it.

    Args:
        plain: float model.
        compression: list of algorithms, in the form of the configuration; empty for none.
        datasets: what `load_digits` returns.
        epochs: of the training.
        path: where the IR goes.
    """
    keras.utils.set_random_seed(0)
    fit_on, _, (images, classes) = datasets
    model = keras.models.clone_model(plain)
    model.set_weights(plain.get_weights())
    if compression:
        config = {"compression": compression}
        model = kc.compress_model(model, config, data=fit_on[0], verbose=False)
    logs = train(model, fit_on, epochs, RATE)
    kc.export(model, path, verify=False)
    masked = logs.get("compression/sparsity")
    return Result(
        accuracy=float(np.mean(ir_classes(path, images) == classes)),
        masked=masked and masked[-1],
        zeros=zeros_of(kc.strip(model)),
        size=path.with_suffix(".bin").stat().st_size,
        zipped=zipped_bytes(path),
        history={k.removeprefix(PREFIX): v for k, v in logs.items() if k.startswith(PREFIX)},
    )


def table_of(results):
    """Returns a table of {name: `Result`}."""
    columns = ("", "accuracy of the IR", "off by masks", "zeros", ".bin, bytes", "IR zipped, bytes")
    table = Table(*columns, title="digits", title_justify="left")
    for name, result in results.items():
        masked = "" if result.masked is None else f"{result.masked:.2%}"
        numbers = (f"{result.zeros:.2%}", f"{result.size:,}", f"{result.zipped:,}")
        table.add_row(name, f"{result.accuracy:.2%}", masked, *numbers)
    return table


def draw(results, path):
    """Draws the sparsity of every layer over the epochs, a panel for each result with masks."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsity"  # the same figures give the same file
    from matplotlib import pyplot

    results = {name: result for name, result in results.items() if result.history}
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(4 * len(results), 3.6), sharey=True, squeeze=False
    )
    for axes, (name, result) in zip(panels[0], results.items(), strict=True):
        for layer, values in result.history.items():
            axes.plot(range(1, len(values) + 1), values, label=layer)
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_ylim(-0.02, 1)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("sparsity")
    panels[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(
    epochs: Annotated[int, typer.Option(help="Epochs of every training.", min=4)] = 30,
    out: Annotated[Path, typer.Option(help="Folder for the IRs and the figure.")] = Path("demo"),
):
    """Train every variant, print one table and draw one figure."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    datasets = load_digits()
    keras.utils.set_random_seed(0)
    plain = digits_network()
    with console.status("float model"):
        train(plain, datasets[0], PRETRAINING, 2e-3)
    results = {}
    for kind, sparsity in sparsities(epochs).items():
        for suffix, quantization in (("", []), (", int8", [{"algorithm": "quantization"}])):
            name = f"{kind}{suffix}"
            compression = ([sparsity] if sparsity else []) + quantization
            path = out / f"sparsity_{len(results)}.xml"
            with console.status(name):
                results[name] = run(plain, compression, datasets, epochs, path)
    console.print(table_of(results))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No figure: matplotlib is not installed.")
        return
    float_results = {name: r for name, r in results.items() if not name.endswith("int8")}
    draw(float_results, out / "sparsity.svg")
    console.print(f"Sparsity of every layer over the epochs: {out / 'sparsity.svg'}")


if __name__ == "__main__":
    typer.run(main)
