"""What the examples of sparsity share: the variants, their figures, one table and one drawing."""

import importlib.util
from dataclasses import dataclass

import keras
import numpy as np
from rich.table import Table

import keras_compress as kc

PREFIX = "compression/sparsity/"
INT8 = {"algorithm": "quantization"}


def sparsities(epochs):
    """Returns {name: the algorithm's part of the configuration, or None}.

    Levels are reached after half of the epochs, masks are fixed after three quarters.
    """
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


def fit(model, images, epochs, **kwargs):
    """Trains a model with the callbacks that it needs; returns the history, {key: per epoch}."""
    callbacks = []
    if isinstance(model, kc.CompressedModel):
        callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    return model.fit(images, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs).history


def zeros_of(model):
    """Returns the fraction of zeros in the kernels of a plain model."""
    layers = (layer for layer in model.layers if hasattr(layer, "kernel"))
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in layers]
    return 1 - sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)


def compare(train, accuracy, epochs, folder, console, title):
    """Trains, exports and judges every variant in float and in int8; prints one table.

    Where matplotlib is installed, the sparsity of every layer over the epochs is drawn.

    Args:
        train: function of a list of algorithms, empty for none, in the form of the configuration.
            Returns the trained model and its history.
        accuracy: function of the path of an IR that returns its accuracy.
        epochs: of every training.
        folder: for the IRs and the figure.
        console: where the table goes.
        title: of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for kind, sparsity in sparsities(epochs).items():
        for suffix, quantization in (("", []), (", int8", [INT8])):
            name = f"{kind}{suffix}"
            path = folder / f"sparsity_{len(results)}.xml"
            with console.status(name):
                model, history = train([sparsity] * bool(sparsity) + quantization)
                results[name] = judged(model, history, path, accuracy)
    console.print(table_of(results, title))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No figure: matplotlib is not installed.")
        return
    float_results = {name: r for name, r in results.items() if not name.endswith("int8")}
    draw(float_results, folder / "sparsity.svg")
    console.print(f"Sparsity of every layer over the epochs: {folder / 'sparsity.svg'}")


def judged(model, history, path, accuracy):
    """Exports a trained model and returns its `Result`."""
    report = kc.export(model, path)
    masked = history.get("compression/sparsity")
    return Result(
        accuracy=accuracy(path),
        masked=masked and masked[-1],
        zeros=zeros_of(kc.strip(model)),
        size=path.with_suffix(".bin").stat().st_size,
        zipped=report.zipped_bytes,
        history={k.removeprefix(PREFIX): v for k, v in history.items() if k.startswith(PREFIX)},
    )


def table_of(results, title):
    """Returns a table of {name: `Result`}."""
    columns = ("", "accuracy of the IR", "off by masks", "zeros", ".bin, bytes", "IR zipped, bytes")
    table = Table(*columns, title=title, title_justify="left")
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
    if len(panels[0, 0].lines) <= 8:
        panels[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
