"""Figures of results. They need matplotlib, which is imported when one is drawn."""

import math
import pathlib

from keras_compress.whole_files import replacing


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
    figure = _figure((6, 4))
    sizes = [each["bytes"] / 1e3 for each in data["front"]]
    losses = [each["loss"] for each in data["front"]]
    axes = figure.subplots()
    axes.step(sizes, losses, where="post", marker="o", markersize=3, label="best widths")
    axes.plot(*_chosen(data), "k*", markersize=12, label="chosen")
    axes.set_yscale("log" if min(losses) > 0 else "linear")
    axes.set_xlabel("weights in the IR, kB")
    axes.set_ylabel("predicted loss added")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_accuracy(result, path):
    """Draw accuracy-aware training: the course of rate and metric, and what each rate cost.

    The left panel has both over the epochs, with the bound; the right one the metric of every epoch
    over its rate, those that no other beats in both joined by a line, and the one that was kept.

    Args:
        result: the `AccuracyAwareResult` of `accuracy_aware_fit`.
        path: file to write; its ending says the format, such as `.svg` or `.png`.

    Raises:
        ValueError: there is no epoch, or no rate: with `early_exit`, not exactly one algorithm of
            the configuration has one.
        ImportError: matplotlib is not installed.
    """
    if not result.epochs or result.epochs[0].rate is None:
        raise ValueError(
            "Expected a result with a rate in every epoch: of `filter_pruning`, of a sparsity, or "
            f"of widths. Received: {len(result.epochs)} epochs without."
        )
    figure = _figure((10, 4.5))
    course, front = figure.subplots(1, 2)
    _draw_course(course, result)
    _draw_front(front, result)
    _save(figure, path)


def _draw_course(axes, result):
    numbers = [each.epoch for each in result.epochs]
    levels = axes.twinx()
    rates = [each.rate for each in result.epochs]
    drawn = levels.step(numbers, rates, where="mid", color="tab:orange", alpha=0.7, label="rate")
    levels.set_ylim(0, 1)
    levels.set_ylabel("rate")
    values = [each.value for each in result.epochs]
    drawn += axes.plot(numbers, values, "o-", markersize=3, label=result.metric)
    drawn += _draw_bounds(axes, result)
    kept = result.epochs[result.epoch]
    drawn += axes.plot(kept.epoch, kept.value, "k*", markersize=12, label="kept")
    axes.set_zorder(levels.get_zorder() + 1)  # lines of the metric over those of the rate
    axes.patch.set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(result.metric)
    axes.grid(alpha=0.3)
    _legend_below(axes, drawn)


def _draw_front(axes, result):
    points = [(e.rate, e.value) for e in result.epochs if e.complete and math.isfinite(e.value)]
    drawn = axes.plot(*_columns(points), "o", color="0.7", markersize=4, label="epochs")
    front = [(each.rate, each.value) for each in result.pareto]
    drawn += axes.plot(*_columns(front), "o-", markersize=4, label="not beaten in both")
    drawn += _draw_bounds(axes, result)
    kept = result.epochs[result.epoch]
    drawn += axes.plot(kept.rate, kept.value, "k*", markersize=12, label="kept")
    axes.set_xlabel("rate")
    axes.set_ylabel(result.metric)
    axes.grid(alpha=0.3)
    _legend_below(axes, drawn)


def _columns(points):
    """Return the first and the second numbers of pairs; there may be none."""
    return [x for x, _ in points], [y for _, y in points]


def _legend_below(axes, drawn):
    axes.legend(
        drawn,
        [each.get_label() for each in drawn],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=3,
        frameon=False,
        fontsize="small",
    )


def _draw_bounds(axes, result):
    """Draw the lines of the original's value and of the bound; return those lines."""
    original = axes.axhline(result.baseline, color="0.4", ls=":", label="original")
    return [original, axes.axhline(result.bound, color="tab:red", ls="--", label="bound")]


def _figure(size):
    """Return an empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=size)


def _save(figure, path):
    figure.tight_layout()
    path = pathlib.Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)


def _chosen(data):
    """Return (kB, predicted loss) of the widths that a plan chose."""
    size = sum(entry["bytes"] for entry in data["precision"]) / 1e3
    loss = sum(entry["loss"] for entry in data["precision"])
    return size, loss
