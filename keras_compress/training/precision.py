"""The search for widths: traces from data, perturbations from weights, times from the machine."""

import json
import math
import pathlib
import tempfile
from typing import NamedTuple

from keras_compress.algorithms.precision import PrecisionProblem
from keras_compress.compressed_layer import layer_spec
from keras_compress.compressed_model import compressed_by
from keras_compress.data import labelled_batches
from keras_compress.export import export
from keras_compress.export.layer_times import layer_times
from keras_compress.graph.rebuild import rebuild
from keras_compress.options import ConfigError, check_file_path
from keras_compress.training.compiled import compile_arguments
from keras_compress.training.hessian import hessian_traces
from keras_compress.whole_files import replacing

KEY = "traces_per_layer_path"
DATA_FILE = "precision.json"


class Found(NamedTuple):
    """What a search came to.

    Attributes:
        config: the configuration with every width written out, as type 'manual'.
        entries: tuple of `PrecisionEntry`.
        front: tuple of `SizeOfChoice`.
    """

    config: object
    entries: tuple
    front: tuple


class PrecisionSearch:
    """What is needed to search for widths, checked before any work is done.

    Args:
        config: the `Config`, whose quantization asks for HAWQ.
        graph: the `Graph` of the user's model.
        model: the user's model; compiled, unless there is a file with traces.
        data: labelled data; not needed with a file of traces.

    Raises:
        ConfigError: no candidate is a width of the device, or the traces cannot be read or written.
        ValueError: without a file of traces: the model is not compiled with a loss, no labels.
    """

    def __init__(self, config, graph, model, data):
        self.config, self.graph = config, graph
        self.quantization = _searching(config)
        self.precision = self.quantization.initializer.precision
        self.problem = PrecisionProblem(self.quantization, graph, config)
        self.keys = [
            (layer.name, weight) for layer in self.problem.layers for weight in layer.weights
        ]
        self.path = _traces_path(self.precision)
        self.traces = None
        if self.path is not None and self.path.exists():
            self.traces = read_traces(self.path, self.keys)
        else:
            self.compile_arguments = compile_arguments(
                model,
                "`initializer.precision.type` 'hawq'",
                f"With `{KEY}` naming a file that is there, traces are read from it.",
            )
            self.batches = _batches(data, graph.inputs, self.precision.num_data_points)

    @classmethod
    def of(cls, config, graph, model, data):
        """Return the search that a configuration asks for, or None."""
        return cls(config, graph, model, data) if _searching(config) else None

    @staticmethod
    def is_possible(config, data):
        """Whether a search that a configuration asks for has what it needs; True without one."""
        quantization = _searching(config)
        if quantization is None or data is not None:
            return True
        path = _traces_path(quantization.initializer.precision)
        return path is not None and path.exists()

    def run(self, report=None):
        """Return what was `Found`; traces and data are written where that is asked.

        Args:
            report: function `(draw, draws at most)`.

        Raises:
            ConfigError: no choice of widths is within the bounds.
        """
        problem = self.problem
        times = None
        if self.precision.budget.latency is not None:
            times = self._times()
        if self.traces is None:
            self.traces = self._traces(report)
        perturbations = problem.perturbations()
        chosen = problem.solve(self.traces, perturbations, times)
        found = Found(
            self._configuration(problem.widths(chosen)),
            problem.entries(chosen, self.traces, perturbations),
            problem.front(self.traces, perturbations),
        )
        if self.precision.dump_init_precision_data:
            self._dump(found)
        return found

    def _traces(self, report):
        model = rebuild(self.graph)
        model.compile(**self.compile_arguments)
        variables = {
            (name, weight): layer_spec(model.get_layer(name)).read(model.get_layer(name), weight)
            for name, weight in self.keys
        }
        found = hessian_traces(
            model,
            variables,
            self.batches,
            self.precision.draws,
            self.precision.tolerance,
            report=report,
        )
        traces = {key: trace.value for key, trace in found.items()}
        if self.path is not None:
            write_traces(self.path, traces)
        return traces

    def _configuration(self, widths):
        chosen = self.quantization.with_widths(widths)
        algorithms = tuple(
            chosen if each is self.quantization else each for each in self.config.algorithms
        )
        written = {name: getattr(self.config, name) for name in self.config.model_fields_set}
        return type(self.config)(**written | {"algorithms": algorithms})

    def _dump(self, found):
        folder = pathlib.Path(self.config.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "layers": [entry.__dict__ for entry in found.entries],
            "front": [each.__dict__ for each in found.front],
            "traces": {"/".join(key): value for key, value in self.traces.items()},
        }
        with replacing(folder / DATA_FILE) as temporary:
            temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _times(self):
        """Return {bits: ({layer: milliseconds}, milliseconds of the rest)}, measured."""
        found = {}
        layers = {layer.name for layer in self.problem.layers}
        for bits in self.problem.candidates:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "model.xml"
                export(self._of_width(bits), path, verify=False)
                times = layer_times(path, self.graph)
            rest = sum(value for name, value in times.items() if name not in layers)
            found[bits] = {name: times.get(name, 0.0) for name in layers}, rest
        return found

    def _of_width(self, bits):
        """Return the model with weights of one width; times do not depend on ranges."""
        plan = self.problem.of_width(bits).plan(self.graph, self.config, with_data=True)
        model = compressed_by(self.graph, plan, self.config)
        for quantizer in model.quantizers():
            quantizer.enable()
            if not quantizer.calibrated:
                quantizer.set_range(0.0, 1.0)
        return model


def _searching(config):
    """Return the quantization of a configuration that asks for HAWQ, or None."""
    for algorithm in config.algorithms:
        if algorithm.name == "quantization" and algorithm.initializer.precision.type == "hawq":
            return algorithm
    return None


def _batches(data, inputs, samples):
    if data is None:
        raise ValueError(
            "Expected labelled data for `initializer.precision.type` 'hawq': "
            "`compress_model(model, config, data=...)` with batches `(inputs, targets)`, or "
            f"`{KEY}` naming a file that is there. Received: data=None"
        )
    return labelled_batches(data, inputs, samples, samples=samples)


def _traces_path(precision):
    """Return the path of the traces, checked, or None."""
    if precision.traces_per_layer_path is None:
        return None
    check_file_path(precision.traces_per_layer_path, KEY)
    return pathlib.Path(precision.traces_per_layer_path)


def write_traces(path, traces):
    """Write traces as JSON `{"layer/weight": average trace}`; whole or not at all."""
    text = json.dumps({"/".join(key): value for key, value in traces.items()}, indent=2)
    with replacing(pathlib.Path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_traces(path, keys):
    """Return the traces that a file holds, `{(layer, weight): average trace}`.

    Args:
        path: a JSON file as `write_traces` writes it.
        keys: pairs (layer, weight) that are needed.

    Raises:
        ConfigError: the file cannot be read, or lacks a finite number for one of them.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        values = {key: float(found["/".join(key)]) for key in keys if "/".join(key) in found}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Expected `{KEY}` to name a JSON file {{'layer/weight': trace}}. "
            f"Received: {KEY}={str(path)!r}: {error}"
        ) from None
    missing = ["/".join(key) for key in keys if not math.isfinite(values.get(key, math.nan))]
    if missing:
        raise ConfigError(
            f"Expected a finite trace in {str(path)!r} for every quantized weight. Received none "
            f"for {missing}. Remove the file to have the traces computed."
        )
    return values
