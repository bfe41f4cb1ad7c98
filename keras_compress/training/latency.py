"""Pruning to a measured latency: how far to prune until the IR is fast enough on this machine."""

import dataclasses
import pathlib
import tempfile

import numpy as np

from keras_compress.algorithms.pruning_plan import HIGHEST_LEVEL, set_masks
from keras_compress.compressed_model import CompressedModel
from keras_compress.export import benchmark, export
from keras_compress.export.layer_times import layer_times
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.options import ConfigError
from keras_compress.strip import strip

TABLE_LEVELS = (0.0, 0.25, 0.5, 0.75)
TOLERANCE = 0.02  # of the latency asked for
FARTHEST = 0.05  # from the fraction asked for: short of it by more is out of reach
MEASUREMENTS = 8  # at most, after the table
CALLS = 60  # at least
SECONDS = 2.0  # per model and measurement, about


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """How long the operations of a model take that make the channels of each group.

    Attributes:
        groups: {name of a group: (int array of channels, array of milliseconds)}, channels rising.
        rest: milliseconds of everything else.
    """

    groups: dict
    rest: float

    def predict(self, channels):
        """Return the milliseconds per call with `channels`, {name of a group: how many are left}.

        Between the widths that were measured, time is taken to be linear.
        """
        times = (np.interp(channels[name], *points) for name, points in self.groups.items())
        return self.rest + float(sum(times))


@dataclasses.dataclass(frozen=True)
class LatencyTarget:
    """The level that a latency takes, and what was measured with it.

    Attributes:
        level: fraction of the channels that may go, as `Prunable.keep` takes it.
        float_ms: shortest call of the float model's IR: other work only ever makes calls longer.
        ms: shortest call of the compressed model's IR at that level, measured in turn with it.
        median: median of the calls that `ms` is the shortest of.
        spread: distance between their quartiles.
    """

    level: float
    float_ms: float
    ms: float
    median: float
    spread: float

    @property
    def removed(self):
        """The fraction of the float model's latency that is gone."""
        return 1 - self.ms / self.float_ms


def find_latency_level(model, original, algorithm, progress=iter):
    """Return the `LatencyTarget` at which a compressed model's IR is as fast as was asked for.

    The IR is profiled at four levels, which gives a table of times per group; its prediction is
    where the search begins. Every step measures the IR in turn with the float model's.

    Args:
        model: the `CompressedModel`, in which nothing has been pruned yet. It is left untouched.
        original: the user's model.
        algorithm: the `FilterPruning` with a `pruning_latency_target`.
        progress: function that passes an iterable of steps on, for a progress bar.

    Raises:
        ConfigError: the target cannot be reached.
    """
    compression = model.get_config()["compression"]
    twin = rebuild(trace(model), model_class=CompressedModel, compression=compression)
    for quantizer in twin.quantizers():
        quantizer.enable()
        if not quantizer.calibrated:  # times do not depend on ranges
            quantizer.set_range(0.0, 1.0)
    prunable = algorithm.prunable(twin)
    scores = prunable.scores()
    with tempfile.TemporaryDirectory() as folder:
        search = _Search(twin, prunable, scores, pathlib.Path(folder))
        export(original, search.float_path, verify=False)
        return search.run(algorithm.params.target, progress)


class _Search:
    """The files and measurements of one search."""

    def __init__(self, twin, prunable, scores, folder):
        self.twin, self.prunable, self.scores = twin, prunable, scores
        self.float_path = folder / "float.xml"
        self.path = folder / "pruned.xml"

    def run(self, target, progress):
        points = {level: self.profile(level) for level in progress(TABLE_LEVELS)}
        table = latency_table(points, self.prunable)
        lowest, highest = 0.0, HIGHEST_LEVEL
        unpruned = self.measure(0.0)
        if unpruned.removed >= target:
            return unpruned
        goal = unpruned.float_ms * (1 - target)
        correction = unpruned.ms / table.predict(self.channels(0.0))
        measured = [unpruned]
        for _ in range(MEASUREMENTS):
            level = self.level_for(table, goal / correction, lowest, highest)
            found = self.measure(level)
            measured.append(found)
            goal = found.float_ms * (1 - target)
            if abs(found.ms / goal - 1) <= TOLERANCE or highest - lowest < 1e-3:
                break
            correction = found.ms / table.predict(self.channels(level))
            lowest, highest = (level, highest) if found.ms > goal else (lowest, level)
        best = min(measured, key=lambda each: abs(each.removed - target))
        if best.removed < target - FARTHEST:
            fastest = max(measured, key=lambda each: each.removed)
            raise ConfigError(
                "Expected a latency that can be reached: with the channels that can go, the IR "
                f"takes {fastest.ms:.3g} ms, {fastest.removed:.0%} less than the float model's "
                f"{fastest.float_ms:.3g} ms. Received: pruning_latency_target={target}"
            )
        return best

    def level_for(self, table, goal, lowest, highest):
        """Return the lowest level within bounds whose predicted latency is within the goal."""
        while highest - lowest > 1e-3:
            middle = (lowest + highest) / 2
            fast = table.predict(self.channels(middle)) <= goal
            lowest, highest = (lowest, middle) if fast else (middle, highest)
        return highest

    def channels(self, level):
        keep = self.prunable.keep(level, self.scores)
        return {g.name: int(keep[g.channels].sum()) for g in self.prunable.groups}

    def write(self, level):
        keep = self.prunable.keep(level, self.scores)
        set_masks(self.prunable.graph, self.prunable.coupling, keep)
        export(strip(self.twin), self.path, verify=False)

    def profile(self, level):
        """Return ({group: channels left}, {layer: milliseconds}) of the IR at a level."""
        self.write(level)
        return self.channels(level), layer_times(self.path, self.prunable.graph)

    def measure(self, level):
        self.write(level)
        paths = [self.float_path, self.path]
        first = benchmark(paths, calls=10).latencies
        calls = max(CALLS, int(SECONDS * 1e3 / max(each.median for each in first)))
        reference, pruned = benchmark(paths, calls=calls).latencies
        times = (reference.fastest, pruned.fastest, pruned.median, pruned.spread)
        return LatencyTarget(level, *times)


def latency_table(points, prunable):
    """Return the `LatencyTable` of profiles at several levels.

    Args:
        points: {level: ({group: channels left}, {layer: milliseconds})}.
        prunable: the `Prunable`.
    """
    group_of = _groups_of_layers(prunable)
    groups, rests = {}, []
    for _, (channels, times) in sorted(points.items(), reverse=True):
        sums = dict.fromkeys(channels, 0.0)
        for layer, milliseconds in times.items():
            if group_of.get(layer) in sums:
                sums[group_of[layer]] += milliseconds
        rests.append(sum(times.values()) - sum(sums.values()))
        for name, count in channels.items():
            groups.setdefault(name, {})[count] = sums[name]
    tables = {}
    for name, found in groups.items():
        counts = sorted(found)
        rising = np.maximum.accumulate([found[count] for count in counts])
        tables[name] = (np.array(counts), rising)
    return LatencyTable(tables, float(np.mean(rests)))


def _groups_of_layers(prunable):
    """Return {name of a layer: name of the group of channels that its output has}."""
    by_channel = {c: g.name for g in prunable.groups for c in g.channels.tolist()}
    found = {}
    for node in prunable.graph.nodes:
        if node.output in prunable.coupling.edges:
            _, channels = prunable.coupling.edges[node.output]
            found[node.name] = by_channel.get(int(channels[0]))
    return found
