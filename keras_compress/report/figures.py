"""What a report measures: histograms against learned ranges, metrics, file sizes, latencies."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import tempfile

import keras
import numpy as np

from keras_compress.binary_quantizers import SignWeights
from keras_compress.compressed_layer import CompressedLayer, layer_spec
from keras_compress.data import input_batches, labelled_batches
from keras_compress.export import benchmark, export
from keras_compress.export.files import stored_files
from keras_compress.export.layer_times import layer_times
from keras_compress.export.saved_model import signature_names
from keras_compress.export.verify import compile_on_cpu
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.walk import Role
from keras_compress.quantizers import Quantizer, SymmetricQuantizer

BINS_INSIDE = 48  # of a histogram, within the learned range
BINS_BESIDE = 8  # at either side of it; the outermost hold everything beyond
MOST_SAMPLES = 10_000  # that metrics are computed on
MOST_BYTES = 2**28  # of inputs that are held for it
BATCH = 32
ACTIVATION_SAMPLES = 128
PROFILED_CALLS = 100
LATENCY_CALLS = 60  # at least
LATENCY_SECONDS = 1.0  # per model, about


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How the values that a quantizer rounds lie in its learned range.

    The range has the same place in every histogram: `BINS_INSIDE` bins, with `BINS_BESIDE` more at
    either side, of which the outermost hold everything beyond. Zeros are not in them.

    Attributes:
        kind: `"weight"` or `"activation"`.
        name: of the layer and its weight, or of the tensor.
        bits: width of the quantizer.
        low: lower end of the range.
        high: upper end.
        unit: what `low` and `high` count: `""` for the values themselves. Where every channel has
            a range of its own: `"steps"`, `"codes"` (steps above the lowest level) or `"scales"`.
        counts: tuple of ints, values per bin.
        zeros: share of all values that is exactly zero, in [0, 1].
        below: share of all values under the range, which are clipped; None where nothing is.
        above: the same over it.
    """

    kind: str
    name: str
    bits: int
    low: float
    high: float
    unit: str
    counts: tuple
    zeros: float
    below: float | None
    above: float | None


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """What one form of a model costs, and how good it is.

    Attributes:
        name: `"float"`, `"compressed"` or `"IR"`; `"model"` for one that is not compressed.
        parameters: without the channels that masks switch off; None where it is not a model's.
        flops: per sample, likewise.
        bytes: of the weights, as float32 or as the IR stores them.
        file_bytes: of the exported model, `.xml` and `.bin`; None unless it was exported. That of
            `float` is its own IR's.
        metrics: {name: value} on the data given.
        latency: median milliseconds per call of the exported model, one sample each; None unless
            measured. That of `float` is its own IR's.
        spread: distance between the quartiles of that.
    """

    name: str
    parameters: int | None
    flops: int | None
    bytes: int | None
    file_bytes: int | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    latency: float | None = None
    spread: float | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """Batches of a model's inputs, and their targets where there are any.

    Attributes:
        batches: list of triples `(inputs, targets, sample weights)`.
        labelled: whether there are targets.
    """

    batches: list
    labelled: bool

    @property
    def count(self):
        """How many samples there are."""
        return sum(len(inputs[0]) for inputs, *_ in self.batches)

    @classmethod
    def read(cls, data, inputs):
        """Read samples as `compress_model` takes them, with their labels where they have any.

        Args:
            data: the samples.
            inputs: the model's inputs in order.

        Raises:
            ValueError: no data, or data that do not fit the model.
        """
        if hasattr(data, "__next__"):
            data, again = itertools.tee(data)
        else:
            again = data
        bytes_each = 4 * sum(math.prod(size or BATCH for size in e.shape[1:]) for e in inputs)
        samples = int(np.clip(MOST_BYTES // bytes_each, 2 * ACTIVATION_SAMPLES, MOST_SAMPLES))
        try:
            return cls(labelled_batches(data, inputs, samples, BATCH, samples), True)
        except ValueError:  # without targets; what is wrong with the inputs comes up again
            batches = input_batches(again, inputs, ACTIVATION_SAMPLES, BATCH)
            return cls([(arrays, None, None) for arrays in batches], False)


class _Counter:
    """Counts values into the bins of a `Histogram`, batch by batch.

    Args:
        quantizer: the `Quantizer`.
    """

    def __init__(self, quantizer):
        self.quantizer = quantizer
        self.counts = np.zeros(BINS_INSIDE + 2 * BINS_BESIDE, "int64")
        self.total = self.zeros = self.below = self.above = 0

    def update(self, values):
        values = np.asarray(values, "float32")
        scaled, self.low, self.high, self.unit = in_units_of(self.quantizer, values)
        scaled = scaled[np.isfinite(scaled)]
        self.total += scaled.size
        self.zeros += int((values == 0).sum())
        position = (scaled - self.low) / (self.high - self.low)
        self.below += int((position < -1e-6).sum())
        self.above += int((position > 1 + 1e-6).sum())
        position = position[values[np.isfinite(values)] != 0]
        bins = np.floor(np.minimum(position, 1 - 1e-6) * BINS_INSIDE)  # the end is inside
        over = position > 1 + 1e-6
        bins[over] = np.floor(position[over] * BINS_INSIDE)
        bins = np.clip(bins + BINS_BESIDE, 0, len(self.counts) - 1).astype("int64")
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def histogram(self, kind, name):
        """Return the `Histogram` of all that was counted."""
        share = 1 / max(self.total, 1)
        clips = not isinstance(self.quantizer, SignWeights)
        return Histogram(
            kind,
            name,
            self.quantizer.bits,
            float(self.low),
            float(self.high),
            self.unit,
            tuple(self.counts.tolist()),
            self.zeros * share,
            self.below * share if clips else None,
            self.above * share if clips else None,
        )


def in_units_of(quantizer, values):
    """Return (values, low, high, unit): values in units in which all channels share one range.

    Args:
        quantizer: a `Quantizer` with a range.
        values: array that it rounds.
    """
    if isinstance(quantizer, SignWeights):
        rounded = np.abs(keras.ops.convert_to_numpy(quantizer(values)))
        rank = values.ndim
        axes = tuple(i for i in range(rank) if i - rank not in (quantizer.axis or ()))
        scale = rounded.max(axis=axes, keepdims=True)
        return values / np.where(scale > 0, scale, 1.0), -1.0, 1.0, "scales"
    low, high = quantizer.effective_range()
    if quantizer.axis is None:
        return values, float(low), float(high), ""
    step = quantizer.step()
    if isinstance(quantizer, SymmetricQuantizer):
        return values / step, quantizer.level_low, quantizer.level_high, "steps"
    return (values - low) / step, 0, quantizer.levels - 1, "codes"


def _has_range(quantizer):
    return quantizer.calibrated and quantizer.is_on


def weight_histograms(graph):
    """Return the `Histogram`s of all quantized weights of a graph, as they are before rounding."""
    found = []
    for name, node in graph.layer_nodes().items():
        if not isinstance(node.op, CompressedLayer):
            continue
        several = len(layer_spec(node.op).weights) > 1
        for weight in layer_spec(node.op).weights:
            value = node.op.raw_weight(weight)
            for transform in node.op.transforms_of(weight):
                if isinstance(transform, Quantizer) and _has_range(transform):
                    counter = _Counter(transform)
                    counter.update(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(value)))
                    label = f"{name}/{weight}" if several else name
                    found.append(counter.histogram("weight", label))
                value = transform(value)
    return found


def activation_histograms(graph, samples):
    """Return the `Histogram`s of all quantized activations of a graph on up to 128 samples.

    Args:
        graph: the `Graph`.
        samples: the `Samples`.
    """
    nodes = [n for n in graph.nodes if n.role is Role.FAKE_QUANTIZE and _has_range(n.op.quantizer)]
    if not nodes:
        return []
    edges = [node.inputs[0] for node in nodes]
    probe = rebuild(dataclasses.replace(graph, output_structure=edges))
    counters = {node.name: _Counter(node.op.quantizer) for node in nodes}
    left = ACTIVATION_SAMPLES
    for inputs, *_ in samples.batches:
        inputs = [array[:left] for array in inputs]
        packed = keras.tree.pack_sequence_as(graph.input_structure, inputs)
        tensors = keras.tree.flatten(probe.predict_on_batch(packed))
        for node, values in zip(nodes, tensors, strict=True):
            counters[node.name].update(values)
        left -= len(inputs[0])
        if left <= 0:
            break
    readable = {node.name: node.inputs[0].name for node in reversed(nodes)}
    return [counter.histogram("activation", readable[name]) for name, counter in counters.items()]


def is_judge(model):
    """Whether a model was compiled with something that says how good an output is."""
    if not getattr(model, "compiled", False):
        return False
    return getattr(model, "loss", None) is not None or bool(_metrics_of(model))


def _metrics_of(model):
    return [metric for metric in model.metrics if metric.name != "loss"]


def metrics_of(judge, predict, samples):
    """Return {name: value}: the loss and metrics that a model was compiled with.

    Args:
        judge: the compiled model.
        predict: function from a flat list of inputs to outputs in the model's structure.
        samples: labelled `Samples`.
    """
    judge.reset_metrics()
    total, found = 0.0, {}
    for inputs, targets, weights in samples.batches:
        outputs = predict(inputs)
        x, y, outputs, weights = keras.tree.map_structure(
            lambda leaf: None if leaf is None else keras.ops.convert_to_tensor(leaf),
            (inputs, targets, outputs, weights),
        )
        found = judge.compute_metrics(x, y, outputs, weights)
        if getattr(judge, "loss", None) is not None:
            loss = judge.compute_loss(x, y, outputs, weights, training=False)
            penalties = sum(float(keras.ops.convert_to_numpy(each)) for each in judge.losses)
            total += len(inputs[0]) * (float(keras.ops.convert_to_numpy(loss)) - penalties)
    values = {
        name: float(keras.ops.convert_to_numpy(value))
        for name, value in found.items()
        if name != "loss" and keras.ops.ndim(value) == 0
    }
    judge.reset_metrics()
    if getattr(judge, "loss", None) is not None:
        return {"loss": total / samples.count} | values
    return values


def predictor(model, graph):
    """Return a function from a flat list of inputs to the outputs of a Keras model."""

    def predict(inputs):
        return model.predict_on_batch(keras.tree.pack_sequence_as(graph.input_structure, inputs))

    return predict


class Exported:
    """The IRs of a model and of the float one it was made from, in a temporary folder.

    Args:
        model: the Keras model.
        graph: its `Graph`.
        original: the float model, or None.
        folder: where the files go.
    """

    def __init__(self, model, graph, original, folder):
        self.graph = graph
        self.names, self.output_names = signature_names(model)
        self.path = pathlib.Path(folder) / "compressed.xml"
        export(model, self.path, verify=False)
        self.float_path = None
        if original is not None:
            self.float_path = pathlib.Path(folder) / "float.xml"
            export(original, self.float_path, verify=False)

    @classmethod
    @contextlib.contextmanager
    def of(cls, model, graph, original):
        """Context with the exported files."""
        with tempfile.TemporaryDirectory() as folder:
            yield cls(model, graph, original, folder)

    def file_bytes(self):
        """Return {"IR": bytes of the model's files}, and "float" where that was exported too."""
        paths = {"IR": self.path, "float": self.float_path}
        return {
            name: sum(file.stat().st_size for file in stored_files(path))
            for name, path in paths.items()
            if path is not None
        }

    def predictor(self):
        """Return a function from a flat list of inputs to the outputs of the IR."""
        import openvino as ov

        compiled = compile_on_cpu(ov.Core(), self.path)

        def predict(inputs):
            results = compiled(dict(zip(self.names, inputs, strict=True)))
            flat = [np.array(results[compiled.output(name)]) for name in self.output_names]
            return keras.tree.pack_sequence_as(self.graph.output_structure, flat)

        return predict

    def latencies(self):
        """Return {"IR": `Latency` of the model's}, and "float" where that was exported too."""
        paths = [path for path in (self.float_path, self.path) if path is not None]
        first = benchmark(paths, calls=5, warm_up=2).latencies
        slowest = max(each.median for each in first)
        calls = max(LATENCY_CALLS, int(LATENCY_SECONDS * 1e3 / slowest))
        found = benchmark(paths, calls=calls).latencies
        return dict(zip(("IR", "float"), reversed(found), strict=False))

    def layer_shares(self):
        """Return {name of a layer: its share of the profiled time}, "" for the rest."""
        times = layer_times(self.path, self.graph, PROFILED_CALLS, np.min)
        total = sum(times.values())
        return {name: milliseconds / total for name, milliseconds in times.items() if total}
