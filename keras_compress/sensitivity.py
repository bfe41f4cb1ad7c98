"""Sensitivity: what a metric loses when one layer alone is compressed.

The model is compressed once. Every quantizer has a switch, and masks are variables too, so that one
compiled evaluation serves the float model, the compressed one and every layer between them.
"""

import dataclasses
import math
import numbers

from rich import box
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from keras_compress.algorithms import Binarization, FilterPruning
from keras_compress.algorithms.weight_sparsity import WeightSparsity
from keras_compress.compress import compress_model
from keras_compress.config import Config
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import Role
from keras_compress.metrics import check_mode
from keras_compress.model_facts import require_ready
from keras_compress.options import ConfigError
from keras_compress.rendering import Rendered
from keras_compress.training.judging import Judge, repeatable
from keras_compress.training.switches import Switches, with_switches

BAR = 30  # columns of the longest bar
LEARNT_MASKS = ("rb_sparsity", "movement_sparsity")


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """What the metric is when one layer alone is compressed.

    Attributes:
        layer: its name; of layers whose channels are pruned together, the first one's.
        value: the metric.
        drop: how much worse that is than the float model's, whichever way is better: below 0
            where it is better. Infinite where the metric is not a number.
        members: names of all layers that were compressed.
    """

    layer: str
    value: float
    drop: float
    members: tuple = ()


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Layers to leave alone so that the metric stays within a budget.

    Attributes:
        ignored_scopes: names to add to the `ignored_scopes` of every algorithm.
        value: the metric of the model that `compress_model` makes then.
        budget: largest loss of the metric that was asked for.
    """

    ignored_scopes: tuple
    value: float
    budget: float


@dataclasses.dataclass(frozen=True)
class Sensitivity(Rendered):
    """How much a metric depends on the compression of every layer; made by `sensitivity`.

    All layers but one are as in the float model. A layer's own are the quantizers and masks of its
    weights and the quantizers of the tensors that it reads; a tensor that several layers read is
    rounded for all of them. Channels are masked together with all that depends on them: layers
    whose channels only go together are one entry, named by the first. Operations without weights
    have an entry where their inputs are rounded. Ranges are those of the compressed model.

    Statistics of batch normalization are not adapted, whatever `num_bn_adaptation_samples` says,
    and `knowledge_distillation` has no part.

    Attributes:
        metric: name of the metric.
        baseline: its value when nothing is compressed.
        compressed: its value when everything is.
        layers: tuple of `LayerSensitivity`, largest drop first.
        suggestion: `Suggestion`, or None where none was asked for or found.
        note: why none was found; empty otherwise.
    """

    metric: str
    baseline: float
    compressed: float
    layers: tuple
    suggestion: Suggestion | None = None
    note: str = ""

    def to_dict(self):
        """Return the result as JSON-able data."""
        found = dataclasses.asdict(self)
        found["layers"] = [each | {"members": list(each["members"])} for each in found["layers"]]
        if self.suggestion is not None:
            names = list(self.suggestion.ignored_scopes)
            found["suggestion"] = found["suggestion"] | {"ignored_scopes": names}
        return found

    def renderable(self):
        title = f"{self.metric}: {self.baseline:.4g} in float, {self.compressed:.4g} compressed"
        columns = ("compressed alone", self.metric, "drop", "")
        table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
        largest = max((e.drop for e in self.layers if math.isfinite(e.drop)), default=0.0)
        for entry in self.layers:
            names = ", ".join(entry.members or (entry.layer,))
            bar = _bar(entry.drop, largest)
            table.add_row(Text(names), f"{entry.value:.4g}", f"{entry.drop:.4g}", bar)
        return Group(table, self._advice()) if self.suggestion or self.note else Group(table)

    def _advice(self):
        if self.suggestion is None:
            return Text(self.note)
        found = self.suggestion
        names = ", ".join(f'"{name}"' for name in found.ignored_scopes)
        what = f'"ignored_scopes": [{names}]' if names else "nothing left out"
        within = f"at most {found.budget:.4g} worse than in float"
        return Text(f"With {what}: {found.value:.4g} ({within}).")


def _bar(drop, largest):
    """Return a bar of blocks as long as a drop is, the largest being `BAR` columns."""
    if not drop > 0:
        return ""
    share = 1.0 if largest <= 0 else min(drop / largest, 1.0)
    return "█" * max(round(BAR * share), 1)


def sensitivity(
    model,
    config,
    data,
    metric="accuracy",
    suggest=False,
    budget=None,
    samples=None,
    verbose=True,
    mode="auto",
):
    """Measure how much a metric loses when one layer alone is compressed.

    The model is compressed as `compress_model` does it, without training and with pruning and
    sparsity at the level that their schedule ends at; `Sensitivity` says what is measured then.

    Args:
        model: any built Keras model, in float. It is left untouched.
        config: dict, path of a JSON file, or `Config`, as for `compress_model`.
        data: labelled samples to calibrate and to judge with, as for `compress_model`. With a
            function as the metric they need no labels.
        metric: name of a metric as `compile(metrics=[...])` takes it; `"loss"`, for the loss that
            `model` was compiled with; a `keras.metrics.Metric`, whose state is used; or a function
            `f(keras_model) -> float`, which must not change the model.
        suggest: whether to look for layers to leave alone so that the rest is within the budget.
        budget: largest loss of the metric, in its own units. Required with `suggest`.
        samples: how many samples to judge with, rounded up to whole batches. None: all of `data`.
        verbose: whether there is a progress bar.
        mode: which way is better, `"max"`, `"min"` or `"auto"`: see `lower_is_better`.

    Raises:
        TypeError, ValueError: a bad argument, or what `compress_model` refuses; masks that only
            training brings; no finite metric in float.

    Example:

    ```python
    found = kc.sensitivity(model, config, validation_ds, suggest=True, budget=0.01)
    print(found)
    ```
    """
    check_mode(mode)
    _check_numbers(suggest, budget, samples)
    config = _measurable(Config.load(config))
    data, graph = repeatable(data), trace(model)
    judge = Judge(metric, model, graph, data, samples, mode)
    with Progress(console=Console(stderr=True), transient=True, disable=not verbose) as bar:
        task = bar.add_task("compressing", total=None)
        switches = _switches(model, graph, config, data)
        bar.update(task, description="layer by layer", total=len(switches.units) + 2)
        measure = Measurement(judge, switches, lambda: bar.advance(task))
        found = measure.layers()
        if not suggest:
            return found
        bar.update(task, description="what to leave alone", total=None)
        search = ScopeSearch(measure, found, model, config, data)
        try:
            return dataclasses.replace(found, suggestion=search.run(budget))
        except NothingFound as reason:  # what was measured is not lost
            return dataclasses.replace(found, note=str(reason))


def _check_numbers(suggest, budget, samples):
    if suggest and budget is None:
        raise ValueError(
            "Expected `budget`, the largest loss of the metric in its own units, with "
            "`suggest=True`. Received: budget=None"
        )
    if not suggest and budget is not None:
        raise ValueError(f"`budget` is for `suggest=True`. Received: {suggest=}, {budget=}")
    is_number = isinstance(budget, numbers.Real) and not isinstance(budget, bool)
    if budget is not None and not (is_number and 0 <= budget < math.inf):
        raise ValueError(f"Expected a budget of 0 or more. Received: {budget=}")
    whole = isinstance(samples, int) and not isinstance(samples, bool)
    if samples is not None and not (whole and samples >= 1):
        raise ValueError(
            f"Expected None or a number of samples of at least 1. Received: {samples=}"
        )


def _switches(model, graph, config, data):
    """Compress a model as a configuration says, so that its layers can be switched."""
    switches = Switches(with_switches(_compressed(model, config, data), graph))
    if not switches.units:
        raise ValueError(
            "Expected a configuration that compresses at least one layer. Received: model "
            f"'{model.name}', of which it leaves all alone: see `keras_compress.plan`."
        )
    return switches


class Measurement:
    """Measures models between the float one and the compressed one.

    Args:
        judge: the `Judge`.
        switches: the `Switches`.
        report: function without arguments, called after every measurement.
    """

    def __init__(self, judge, switches, report):
        self.judge, self.switches, self.report = judge, switches, report
        self.everything = [name for unit in switches.units for name in unit]

    def __call__(self, on):
        """Return the metric with the layers named compressed, and no others."""
        self.switches.put(on)
        value = self.judge(self.switches.model)
        self.report()
        return value

    def layers(self):
        """Return the `Sensitivity`, without a suggestion.

        Raises:
            ValueError: the metric of the float model is not finite.
        """
        baseline = self(())
        if not math.isfinite(baseline):
            raise ValueError(
                "Expected a metric that is a finite number for the float model. "
                f"Received: metric={self.judge.name!r}, {baseline}"
            )
        compressed = self(self.everything)
        values = [(unit, self(unit)) for unit in self.switches.units]
        drop = self.judge.drop
        found = [LayerSensitivity(u[0], v, drop(v, baseline), u) for u, v in values]
        found.sort(key=lambda entry: -entry.drop)
        return Sensitivity(self.judge.name, baseline, compressed, tuple(found))


class NothingFound(Exception):
    """Says why there are no layers that a budget could be kept without."""


class ScopeSearch:
    """Looks for the layers to leave alone so that a metric stays within a budget.

    Args:
        measure: the `Measurement`.
        found: the `Sensitivity`, whose order is followed.
        model: the user's model.
        config: the `Config`.
        data: as for `sensitivity`.
    """

    def __init__(self, measure, found, model, config, data):
        self.measure, self.found = measure, found
        self.model, self.config, self.data = model, config, data
        graph = trace(model)
        names = {node.name for node in graph.nodes}
        if any(isinstance(a, (WeightSparsity, Binarization)) for a in config.algorithms):
            names = {node.name for node in graph.nodes if node.role is Role.WEIGHTED}
        self.candidates = [e for e in found.layers if names.issuperset(e.members)]

    def run(self, budget):
        """Return the `Suggestion`.

        The most sensitive layers are left alone, one more at a time, until the others together are
        within the budget; then each is taken back that turns out not to be needed. What is left is
        compressed by `compress_model`, whose ranges and pruning may differ without those layers:
        more are left alone until that model, too, is within the budget.

        Raises:
            NothingFound: there is no such model.
        """
        found = self.found
        if self._within(found.compressed, budget):
            return Suggestion((), found.compressed, budget)
        left = self._fewest(budget)
        waiting = [entry for entry in self.candidates if entry not in left]
        while True:
            scopes = tuple(name for entry in left for name in entry.members)
            value = self._compressed_value(scopes, budget)
            if self._within(value, budget):
                return Suggestion(scopes, value, budget)
            if not waiting:
                result = f"with {found.metric}={value:.4g} ({found.baseline:.4g} in float)"
                raise self._nothing_found(budget, scopes, result)
            left.append(waiting.pop(0))

    def _fewest(self, budget):
        """Return the entries to leave alone, by switches."""
        left = []
        for entry in self.candidates:
            left.append(entry)
            if self._within(self._without(left), budget):
                break
        for entry in left[-2::-1]:  # without the last one, it was not within the budget
            others = [each for each in left if each is not entry]
            if self._within(self._without(others), budget):
                left = others
        return left

    def _without(self, left):
        names = {name for entry in left for name in entry.members}
        return self.measure([name for name in self.measure.everything if name not in names])

    def _within(self, value, budget):
        return self.measure.judge.drop(value, self.found.baseline) <= budget

    def _compressed_value(self, scopes, budget):
        try:
            model = _compressed(self.model, _ignoring(self.config, scopes), self.data)
        except ConfigError as error:
            refused = "which `compress_model` refuses: nothing may be left for an algorithm"
            raise self._nothing_found(budget, scopes, refused) from error
        return self.measure.judge(model)

    def _nothing_found(self, budget, scopes, result):
        return NothingFound(
            f"Nothing to suggest: for a budget of {budget:.4g}, {list(scopes)} would be left "
            f"alone, {result}. Raise the budget, or leave an algorithm out of the configuration."
        )


def _compressed(model, config, data):
    """Compress a model; all that a schedule or a later epoch would bring is there at once."""
    compressed = compress_model(model, config, data=data, verbose=False)
    for algorithm in config.algorithms:
        if algorithm.adjustable:
            algorithm.set_rate(compressed, algorithm.final_rate)
    for quantizer in compressed.quantizers():
        quantizer.enable()
    require_ready(compressed)
    return compressed


def _measurable(config):
    """Return a configuration without what is of no use here: teachers, adaptation, files to write.

    Raises:
        ValueError: it has an algorithm whose masks only training brings.
    """
    for each in config.algorithms:
        what = each.name if each.name in LEARNT_MASKS else ""
        if isinstance(each, FilterPruning) and each.params.filter_importance == "taylor":
            what = f"{each.name} with filter_importance='taylor'"
        if what:
            raise ValueError(
                "Expected algorithms that show before training what they take away. Received: "
                f"{what}, whose masks only training brings. Leave it out of the configuration."
            )
    kept = [each for each in config.algorithms if each.name != "knowledge_distillation"]
    return _with_entries(config, [_without_side_effects(each) for each in kept])


def _without_side_effects(algorithm):
    """Return an algorithm's entry that adapts no statistics and writes no result of a search."""
    entry = algorithm.to_dict()
    if hasattr(getattr(algorithm, "initializer", None), "batchnorm_adaptation"):
        initializer = dict(entry.get("initializer", {}))
        initializer["batchnorm_adaptation"] = {"num_bn_adaptation_samples": 0}
        initializer.get("precision", {}).pop("dump_init_precision_data", None)
        entry["initializer"] = initializer
    entry.get("params", {}).pop("save_ranking_coeffs_path", None)
    return entry


def _ignoring(config, names):
    """Return a configuration whose algorithms leave further layers alone."""
    entries = [algorithm.to_dict() for algorithm in config.algorithms]
    for entry in entries:
        entry["ignored_scopes"] = [*entry.get("ignored_scopes", ()), *names]
    return _with_entries(config, entries)


def _with_entries(config, entries):
    return Config.load(config.to_dict() | {"compression": entries})
