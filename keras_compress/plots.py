"""Figures of plans. They need matplotlib, which is imported when one is drawn."""

import pathlib

from keras_compress.export.files import replacing


def draw_pareto(decided, path):
    """Draw the size of the weights against the loss that is predicted for the best widths.

    The choice that the plan made is marked among those that no other beats in both.

    Args:
        decided: a `Plan` made by a search for widths: `kc.plan(model, config, data=...)`, or
            `model.plan` of a compressed model as a dictionary.
        path: file to write; its ending says the format, such as `.svg` or `.png`.

    Raises:
        ValueError: no widths were searched for in this plan.
        ImportError: matplotlib is not installed.
    """
    data = decided if isinstance(decided, dict) else decided.to_dict()
    if not data.get("front"):
        raise ValueError(
            "Expected a plan with a search for widths: `initializer.precision.type` 'hawq', and "
            f"data or a file of traces. Received: the plan of model '{data.get('model')}' without."
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: pip install matplotlib") from error
    sizes = [each["bytes"] / 1e3 for each in data["front"]]
    losses = [each["loss"] for each in data["front"]]
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.step(sizes, losses, where="post", marker="o", markersize=3, label="best widths")
    axes.plot(*_chosen(data), "k*", markersize=12, label="chosen")
    axes.set_yscale("log" if min(losses) > 0 else "linear")
    axes.set_xlabel("weights in the IR, kB")
    axes.set_ylabel("predicted loss added")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = pathlib.Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)


def _chosen(data):
    """Return (kB, predicted loss) of the widths that a plan chose."""
    size = sum(entry["bytes"] for entry in data["precision"]) / 1e3
    loss = sum(entry["loss"] for entry in data["precision"])
    return size, loss
