"""Prunes ResNet-20 on CIFAR-10, and prunes and quantizes it in one training.

    python examples/cifar10_prune_quantize.py main --data cifar-10-batches-bin
    python examples/cifar10_prune_quantize.py criteria --data cifar-10-batches-bin

`main` takes 40 % of the filters away and compares float, pruned and pruned + int8, as trained and
as OpenVINO IR. `criteria` compares how filters are chosen, at equal FLOPs; it needs matplotlib. It
can be interrupted: the same command carries on after the last finished training.
"""

import importlib.util
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json5
import keras
import numpy as np
import typer
from cifar10_resnet20 import (
    CHECKPOINT,
    checked_datasets,
    compile_model,
    evaluate_ir,
    fit,
    load_datasets,
    measure_latency,
)
from rich.console import Console
from rich.table import Table

import keras_compress as kc
from keras_compress.training.batch_norm import adapt_to_batches

EXAMPLES = Path(__file__).resolve().parent
WORK = Path("cifar10_prune_quantize")
BATCH = 128
PEAK = 0.03
ADAPTATION = 16  # batches

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0])
Data = Annotated[Path, typer.Option(help="Folder with the CIFAR-10 binary files.")]
Checkpoint = Annotated[
    Path, typer.Option(help="The float model.", show_default="examples/checkpoints/")
]
Epochs = Annotated[int, typer.Option(help="Epochs of one training.")]
Steps = Annotated[int, typer.Option(help="Batches of 128 random images per epoch; at most 375.")]
Work = Annotated[Path, typer.Option(help="Folder for the results.")]


# ---------------------------------------------------------------- both commands


@dataclass(frozen=True)
class Training:
    """What all trainings of a command share."""

    data: Path
    checkpoint: Path
    epochs: int
    steps: int

    def run(self, config, seed=0, callbacks=()):
        """Returns the float model, compressed and trained; one seed gives one order of images."""
        keras.utils.set_random_seed(seed)
        train, validation, _ = load_datasets(self.data, BATCH)
        model = keras.models.load_model(self.checkpoint, compile=False)
        self.compile(model)  # a learned ranking is found by training
        model = kc.compress_model(model, config, data=train, verbose=False)
        self.compile(model)
        callbacks = [kc.callbacks.Compress(), *callbacks]
        fit(model, train.take(self.steps), validation, self.epochs, callbacks)
        return model

    def compile(self, model):
        """Compiles a model for all epochs."""
        steps = self.epochs * self.steps
        compile_model(model, PEAK, steps, warmup=steps // 50)


def configuration(name):
    """Returns a configuration of this folder as a dictionary."""
    return json5.loads((EXAMPLES / name).read_text())


def prepared(data, checkpoint, work):
    """Returns the datasets and the float model; what is missing is an error of the command line."""
    datasets = checked_datasets(data, BATCH, checkpoint)
    work.mkdir(parents=True, exist_ok=True)
    return datasets, keras.models.load_model(checkpoint, compile=False)


def accuracy(model, dataset):
    """Returns the fraction of the images that a Keras model classifies right."""
    labels = np.concatenate([labels.numpy().reshape(-1) for _, labels in dataset])
    return float(np.mean(model.predict(dataset, verbose=0).argmax(-1) == labels))


# ---------------------------------------------------------------- main


@app.command()
def main(
    data: Data,
    epochs: Epochs = 5,
    steps: Steps = 100,
    checkpoint: Checkpoint = CHECKPOINT,
    work: Work = WORK,
):
    """Prunes 40 % of the filters with and without int8, each in one fit, and prints a table."""
    (_, _, test), model = prepared(data, checkpoint, work)
    training = Training(data, checkpoint, epochs, steps)
    config = configuration("cifar10_prune_quantize.json")
    pruning_alone = config | {"compression": config["compression"][:1]}
    models, seconds = {"float": model}, {"float": 0.0}
    for name, each in (("pruned", pruning_alone), ("pruned + int8", config)):
        began = time.perf_counter()
        models[name] = training.run(each)
        seconds[name] = time.perf_counter() - began
    compare(models, seconds, test, work)


def compare(models, seconds, test, work):
    """Strips and exports every model, and prints one row for each."""
    irs, reports = [], []
    for name, model in models.items():
        stripped = kc.strip(model)
        irs.append(work / f"{name.replace(' + ', '_')}.xml")
        kc.export(stripped, irs[-1])
        reports.append(kc.report(stripped))
    latencies = measure_latency(irs)
    table = Table(title="ResNet-20 on CIFAR-10, 10 000 test images")
    table.add_column("model", no_wrap=True)
    for column in (
        "accuracy, Keras",
        "accuracy, IR",
        "parameters",
        "MFLOPs",
        ".bin, kB",
        "latency, ms",
        "float / this",
        "training, s",
    ):
        table.add_column(column, justify="right")
    for (name, model), ir, report, latency in zip(
        models.items(), irs, reports, latencies, strict=True
    ):
        table.add_row(
            name,
            f"{accuracy(model, test):.2%}",
            f"{evaluate_ir(ir, test):.2%}",
            f"{report.parameters:,}",
            f"{report.flops / 1e6:.1f}",
            f"{ir.with_suffix('.bin').stat().st_size / 1000:.0f}",
            f"{latency:.3f}",
            f"{latencies[0] / latency:.2f}",
            f"{seconds[name]:.0f}",
        )
    Console(width=120).print(table)


# ---------------------------------------------------------------- criteria


@dataclass(frozen=True)
class Variant:
    """A way of choosing filters: its name, and the `params` of filter pruning that it sets."""

    name: str
    params: dict


CRITERIA = ("L1", "L2", "geometric_median", "batch_norm_scale", "taylor", "random")
LEGR = {"generations": 30, "population_size": 10, "num_samples": 4, "train_steps": 20}
VARIANTS = (
    *(Variant(criterion, {"filter_importance": criterion}) for criterion in CRITERIA),
    Variant("L2, all_weights", {"filter_importance": "L2", "all_weights": True}),
    Variant(
        "L2, learned_ranking",
        {
            "filter_importance": "L2",
            "interlayer_ranking_type": "learned_ranking",
            "legr_params": LEGR,
        },
    ),
)


@dataclass(frozen=True)
class Result:
    """What one training of one variant came to.

    Attributes:
        variant: its name.
        seed: what decides the order of the images, and what `random` prunes.
        parameters: of the model after removal.
        flops: of the model after removal.
        pruned: test accuracy as soon as the filters are off, a fraction.
        adapted: the same with the statistics of batch normalization taken anew.
        trained: test accuracy after training.
    """

    variant: str
    seed: int
    parameters: int
    flops: int
    pruned: float
    adapted: float
    trained: float


class AtEpoch(keras.callbacks.Callback):
    """Calls a function with the model when an epoch begins, and keeps its `result`.

    Behind `Compress` in the list of callbacks, it finds the masks of that epoch in the model.

    Args:
        epoch: the epoch, counted from 0.
        function: what to call.
    """

    def __init__(self, epoch, function):
        super().__init__()
        self.epoch, self.function, self.result = epoch, function, None

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.result = self.function(self.model)


@app.command()
def criteria(
    data: Data,
    epochs: Epochs = 4,
    steps: Steps = 75,
    repeats: Annotated[int, typer.Option(help="Trainings of each criterion.")] = 1,
    checkpoint: Checkpoint = CHECKPOINT,
    work: Work = WORK,
):
    """Prunes 43 % of the FLOPs by every criterion; writes importance.json and importance.svg."""
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the figure needs matplotlib: pip install matplotlib")
    (train, _, test), model = prepared(data, checkpoint, work)
    training = Training(data, checkpoint, epochs, steps)
    path = work / "importance.json"
    figures = {
        "epochs": epochs,
        "images_per_epoch": steps * BATCH,
        "results": found(path, training),
    }
    figures["float"] = {"accuracy": accuracy(model, test), "flops": kc.report(model).flops}
    samples = [[images.numpy()] for images, _ in train.take(ADAPTATION)]
    done = {(result["variant"], result["seed"]) for result in figures["results"]}
    for seed, variant in itertools.product(range(repeats), VARIANTS):
        if (variant.name, seed) not in done:
            result = measure(variant, seed, training, samples, test)
            figures["results"].append(asdict(result))
        path.write_text(json.dumps(figures, indent=1) + "\n")
    plot(figures, work / "importance.svg")
    Console(width=120).print(criteria_table(figures))


def found(path, training):
    """Returns the results that an earlier, interrupted run of the same length has left."""
    if not path.exists():
        return []
    figures = json.loads(path.read_text())
    length = {"epochs": training.epochs, "images_per_epoch": training.steps * BATCH}
    if {key: figures[key] for key in length} != length:
        raise typer.BadParameter(
            f"there are results of other trainings, expected {length}. Received: {path}",
            param_hint="--work",
        )
    return figures["results"]


def criteria_configuration(variant, seed):
    """Returns the configuration of a variant; the seed is that of `random`."""
    config = configuration("cifar10_criteria.json")
    config["compression"]["params"] |= variant.params | {"random_seed": seed}
    return config


def measure(variant, seed, training, samples, test):
    """Returns the `Result` of a variant: masks after some epochs, then training on."""
    config = criteria_configuration(variant, seed)

    def right_after(model):
        pruned = kc.strip(model)  # a copy: the training goes on from where it was
        at_once = accuracy(pruned, test)
        adapt_to_batches(pruned, samples)
        return at_once, accuracy(pruned, test)

    pruned = AtEpoch(config["compression"]["params"]["num_init_steps"], right_after)
    stripped = kc.strip(training.run(config, seed, [pruned]))
    report = kc.report(stripped)
    trained = accuracy(stripped, test)
    return Result(variant.name, seed, report.parameters, report.flops, *pruned.result, trained)


def by_variant(figures):
    """Returns {variant: {key: array with one value per training}}, in the order of `VARIANTS`."""
    measured = {result["variant"] for result in figures["results"]}
    return {
        name: {
            key: np.array([r[key] for r in figures["results"] if r["variant"] == name])
            for key in ("pruned", "adapted", "trained", "flops", "parameters")
        }
        for name in (variant.name for variant in VARIANTS if variant.name in measured)
    }


def criteria_table(figures):
    """Returns a table with the mean of each criterion, and its extremes where they differ."""
    table = Table(title=f"ResNet-20 on CIFAR-10, {figures['float']['accuracy']:.2%} before")
    table.add_column("criterion")
    for column in ("right after", "batch norm adapted", "trained", "FLOPs", "parameters"):
        table.add_column(column, justify="right")
    for name, values in by_variant(figures).items():
        table.add_row(
            name,
            *(_range(values[key]) for key in ("pruned", "adapted", "trained")),
            f"{values['flops'].mean() / figures['float']['flops']:.1%}",
            f"{values['parameters'].mean():,.0f}",
        )
    return table


def _range(values):
    mean = f"{values.mean():.1%}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.1%} to {values.max():.1%})"


def plot(figures, path):
    """Draws the accuracies of every criterion: the mean, and a bar from lowest to highest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "importance"  # the same figures give the same file
    from matplotlib import pyplot

    variants = by_variant(figures)
    columns = {"adapted": "right after pruning", "trained": "after training"}
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 0.6 + 0.4 * len(variants)), sharey=True)
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        for row, values in enumerate(variants.values()):
            found = 100 * values[key]
            axis.plot(
                [found.min(), found.max()],
                [row, row],
                color="#7aa6d6",
                linewidth=5,
                solid_capstyle="butt",
            )
            axis.plot(found.mean(), row, "o", color="#1f4e8c")
        axis.axvline(100 * figures["float"]["accuracy"], color="#888888", linestyle=":")
        axis.set_yticks(range(len(variants)), variants)
        axis.set(title=title, xlabel="test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    app()
