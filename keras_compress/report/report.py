"""What a model is made of, how good it is, and why some of it stays float: as a table or a page."""

import contextlib
import dataclasses
import math
from dataclasses import replace

import keras
from rich import box
from rich.console import Group
from rich.table import Table

from keras_compress.algorithms import FilterPruning
from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.compressed_model import CompressedModel
from keras_compress.graph.trace import trace
from keras_compress.layers import CompressedLayer, FakeQuantize
from keras_compress.model_facts import quantizers_of, require_ready
from keras_compress.plan import size_table
from keras_compress.rendering import Rendered
from keras_compress.report.figures import (
    Exported,
    ModelFigures,
    Samples,
    activation_histograms,
    is_judge,
    metrics_of,
    predictor,
    weight_histograms,
)
from keras_compress.report.layers import FLOAT_BYTES, LayerReport, layer_reports
from keras_compress.report.page import checked_page_path, page
from keras_compress.strip import strip
from keras_compress.whole_files import replacing

USUAL_COLUMNS = 8  # of the table of layers; with more, headers take two lines
SPARSE = 0.1  # share of zeros in a layer from which on the table shows sparsity

__all__ = ["LayerReport", "Report", "report"]


@dataclasses.dataclass(frozen=True)
class Report(Rendered):
    """What a model is made of, layer by layer; made by `report`.

    Attributes:
        model: name of the model.
        layers: tuple of `LayerReport` in order of execution.
        sizes: tuple of `SizeEntry` of a pruned model: before pruning, now, and the level.
        figures: tuple of `ModelFigures`: the float model, this one, and its IR where it was made.
        histograms: tuple of `Histogram`: weights in order of execution, then activations.
        history: {name: list of numbers, one per epoch}: training curves.
        sensitivity: what each layer loses, as it was given to `report`, or None.
        keys: tuple of dicts `key`, `status`, `reason`: what became of the configuration.
        notes: tuple of remarks on what was measured.
    """

    model: str
    layers: tuple
    sizes: tuple = ()
    figures: tuple = ()
    histograms: tuple = ()
    history: dict = dataclasses.field(default_factory=dict)
    sensitivity: object = None
    keys: tuple = ()
    notes: tuple = ()

    @property
    def parameters(self):
        """Number of weights."""
        return self._total("parameters")

    @property
    def flops(self):
        """FLOPs per sample, two per multiply-accumulate."""
        return self._total("flops")

    @property
    def bytes_before(self):
        """Bytes of all weights in float32."""
        return self._total("bytes_before")

    @property
    def bytes_after(self):
        """Bytes of all weights as they are stored in OpenVINO IR."""
        return self._total("bytes_after")

    @property
    def left_alone(self):
        """The layers that compression left in float, largest share of FLOPs first."""
        chosen = [layer for layer in self.layers if layer.reason]
        return tuple(sorted(chosen, key=lambda layer: -layer.flops))

    @property
    def float_share(self):
        """Share of the FLOPs that compression left in float, in [0, 1]."""
        return sum(map(self.share, self.left_alone))

    @property
    def is_sparse(self):
        """Whether a tenth of the weights of some layer is zero."""
        return any((layer.sparsity or 0.0) >= SPARSE for layer in self.layers)

    @property
    def is_pruned(self):
        """Whether channels of some layer are masked or gone."""
        return any(layer.filters_kept != layer.filters for layer in self.layers)

    def share(self, layer):
        """Return the share of the model's FLOPs that a `LayerReport` has, in [0, 1]."""
        return layer.flops / max(self.flops, 1)

    def to_dict(self):
        """Return the report as JSON-able data; a number that is none becomes None."""
        totals = ("parameters", "flops", "bytes_before", "bytes_after", "float_share")
        data = {
            "model": self.model,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "left_alone": [
                {"layer": layer.layer, "reason": layer.reason, "share": self.share(layer)}
                for layer in self.left_alone
            ],
            "sizes": [dataclasses.asdict(size) | {"level": size.level} for size in self.sizes],
            "figures": [dataclasses.asdict(each) for each in self.figures],
            "histograms": [
                dataclasses.asdict(each) | {"counts": list(each.counts)} for each in self.histograms
            ],
            "history": self.history,
            "sensitivity": _sensitivity_dict(self.sensitivity),
            "keys": list(self.keys),
            "notes": list(self.notes),
            **{name: getattr(self, name) for name in totals},
        }
        return keras.tree.map_structure(_finite_or_none, data)

    def save(self, path):
        """Write the report as one HTML page that needs nothing else, whole or not at all.

        Args:
            path: a file that ends in `.html` or `.htm`, in a folder that exists.

        Raises:
            ValueError: another ending.
            OSError: the folder is missing or not writable, or a folder is in the way.

        Example:

        ```python
        kc.report(model, original=float_model, data=test_ds, history=history).save("report.html")
        ```
        """
        path = checked_page_path(path)
        with replacing(path) as temporary:
            temporary.write_text(page(self), encoding="utf-8")

    def renderable(self):
        parts = [self._layer_table()]
        if any(each.metrics or each.latency is not None for each in self.figures) or (
            len(self.figures) > 1 and self.figures[0].name == "float"
        ):
            parts.append(_figure_table(self.figures))
        if self.sizes:
            parts.append(size_table(self.sizes))
        if self.left_alone:
            title = f"Left in float ({self.float_share:.2%} of the FLOPs)"
            table = Table(
                "layer", "type", "FLOPs", "why", title=title, title_justify="left", box=box.SIMPLE
            )
            for layer in self.left_alone:
                table.add_row(layer.layer, layer.type, f"{self.share(layer):.2%}", layer.reason)
            parts.append(table)
        return Group(*parts)

    def _layer_table(self):
        table = Table(title=self.model, title_justify="left", box=box.SIMPLE, show_footer=True)
        columns = list(self._columns())
        for header, footer, _ in columns:
            justify = "left" if header in ("layer", "type") else "right"
            if len(columns) > USUAL_COLUMNS:
                header = header.replace(" ", "\n")
            table.add_column(header, footer, justify=justify, overflow="fold")
        for layer in self.layers:
            table.add_row(*(cell(layer) for *_, cell in columns))
        return table

    def _columns(self):
        """Yield (header, footer, function from a `LayerReport` to its cell)."""
        ratio = self.bytes_after / max(self.bytes_before, 1)
        yield "layer", "total", lambda layer: layer.layer
        yield "type", "", lambda layer: layer.type
        yield "parameters", f"{self.parameters:,}", lambda layer: f"{layer.parameters:,}"
        yield "FLOPs", f"{self.flops:,}", lambda layer: f"{layer.flops:,}"
        yield "weight bits", "", lambda layer: _bits_text(layer.weight_bits, layer.parameters)
        yield "input bits", "", lambda layer: _bits_text(layer.activation_bits, layer.weight_bits)
        if self.is_sparse:
            yield "zeros", "", lambda layer: _or_empty(layer.sparsity, "{:.1%}")
        if self.is_pruned:
            yield "filters", "", _filters_text
        if any(layer.latency_share is not None for layer in self.layers):
            yield "latency", "", lambda layer: _or_empty(layer.latency_share, "{:.1%}")
        yield "float32 bytes", f"{self.bytes_before:,}", lambda layer: f"{layer.bytes_before:,}"
        total = f"{self.bytes_after:,} ({ratio:.1%})"
        yield "IR bytes", total, lambda layer: f"{layer.bytes_after:,}"

    def _total(self, name):
        return sum(getattr(layer, name) for layer in self.layers)


def report(model, original=None, data=None, history=None, sensitivity=None, latency=False):
    """Say what a Keras model is made of, and on request how good and how fast it is.

    In a compressed model the widths are those of its quantizers. In a stripped or plain model the
    width of a weight is found in its values, as export finds it: 8, 4, 2 bits or 1 if they lie on
    such a grid.

    Args:
        model: any built Keras model: compressed, stripped or plain.
        original: the float model that was compressed: its figures appear beside those of `model`.
        data: samples as `compress_model` takes them, for histograms of the quantized activations.
            With labels, and a `model` or an `original` that is compiled, its loss and metrics are
            computed on up to 10,000 of them, for every model and for the exported IR.
        history: `keras.callbacks.History`, or a dict {name: list of numbers}: training curves.
        sensitivity: what each layer costs: an object with `metric`, `baseline`, `compressed`,
            `layers` and `suggestion`, as `keras_compress.sensitivity` gives it.
        latency: whether to export both models to OpenVINO IR in a temporary folder and measure
            them in turn on this machine, and each layer's share of it.

    Returns:
        A `Report`: a table in a terminal or notebook, a dictionary through `.to_dict()`, a page
        through `.save("report.html")`.

    Raises:
        TypeError, ValueError: not a Keras model, or not built; an `original` that is compressed or
            of other inputs; data, a history or a sensitivity that do not fit; data or latency of a
            model whose ranges are not set.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    >>> report(model).parameters, report(model).flops, report(model).bytes_before
    (15, 24, 60)
    """
    graph = trace(model)
    original_graph = _checked_original(original, graph)
    history = _checked_history(history)
    _check_sensitivity(sensitivity)
    if not isinstance(latency, bool):
        raise TypeError(f"Expected True or False. Received: latency={latency!r}")
    if data is not None or latency:
        require_ready(model)
    samples = None if data is None else Samples.read(data, graph.inputs)
    plan = model.plan if isinstance(model, CompressedModel) else {}
    work = _Work(model, graph, original, original_graph, samples, latency)
    with work:
        layers = layer_reports(graph, plan, work.latency_shares)
        sizes = _sizes(model)
        return Report(
            graph.name,
            layers,
            sizes,
            figures=work.figures(layers, sizes),
            histograms=(*weight_histograms(graph), *work.activations()),
            history=history,
            sensitivity=sensitivity,
            keys=tuple(dict(key) for key in plan.get("keys", ())),
            notes=tuple(work.notes),
        )


class _Work(contextlib.ExitStack):
    """What one report measures, with the files that it needs for as long as the context lasts."""

    def __init__(self, model, graph, original, original_graph, samples, latency):
        super().__init__()
        self.model, self.graph = model, graph
        self.original, self.original_graph = original, original_graph
        self.samples = samples
        self.latency = latency
        self.notes = []
        self.judge = None
        if samples is not None and samples.labelled:
            self.judge = next((m for m in (model, original) if is_judge(m)), None)
            if self.judge is None:
                self.notes.append("No metrics: the model is not compiled with any.")
            else:
                self.notes.append(f"Metrics are those of {samples.count:,} samples.")
        self.exported = None
        self.latency_shares = None

    def __enter__(self):
        super().__enter__()
        if self.latency or self.judge is not None:
            reference = self.original if self.latency else None
            exported = Exported.of(self.model, self.graph, reference)
            self.exported = self.enter_context(exported)
        if self.latency:
            self.latency_shares = self.exported.layer_shares()
            self.notes.append("Latency is the median of calls with one sample, each IR in turn.")
        return self

    def activations(self):
        """Return the histograms of activations, where there are data."""
        return () if self.samples is None else activation_histograms(self.graph, self.samples)

    def figures(self, layers, sizes):
        """Return the `ModelFigures` of all forms of the model."""
        ours = self._own_figures(layers)
        full = self._float_figures(layers, sizes)
        is_plain = (
            self.original is None
            and not isinstance(self.model, CompressedModel)
            and full.bytes == ours.bytes
        )
        found = [replace(ours, name="model")] if is_plain else [full, ours]
        if self.exported is not None:
            sizes = self.exported.file_bytes()
            found.append(ModelFigures("IR", None, None, None))
            found = [replace(each, file_bytes=sizes.get(each.name)) for each in found]
        if self.judge is not None:
            found = [self._with_metrics(each) for each in found]
        if self.latency:
            times = self.exported.latencies()
            found = [_with_latency(each, times.get(each.name)) for each in found]
        return tuple(found)

    def _own_figures(self, layers):
        """Return those of the model without the channels that masks switch off."""
        masked = MaskedGraph.of(self.graph)
        if masked is not None and not masked.keep.all() and _is_ready(self.model):
            layers = layer_reports(trace(strip(self.model)), {})
        return ModelFigures("compressed", *_totals(layers, "bytes_after"))

    def _float_figures(self, layers, sizes):
        """Return those of the float model: given, or as large as the one that was compressed."""
        if self.original is not None:
            layers = layer_reports(self.original_graph, {})
            return ModelFigures("float", *_totals(layers, "bytes_before"))
        full = {size.what: size.full for size in sizes}
        parameters, flops, _ = _totals(layers, "bytes_before")
        parameters = full.get("parameters", parameters)
        return ModelFigures("float", parameters, full.get("FLOPs", flops), FLOAT_BYTES * parameters)

    def _with_metrics(self, figures):
        if figures.name == "float" and self.original is None:
            return figures
        if figures.name == "IR":
            predict = self.exported.predictor()
        elif figures.name == "float":
            predict = predictor(self.original, self.original_graph)
        else:
            predict = predictor(self.model, self.graph)
        return replace(figures, metrics=metrics_of(self.judge, predict, self.samples))


def _totals(layers, size):
    return tuple(
        sum(getattr(row, name) for row in layers) for name in ("parameters", "flops", size)
    )


def _with_latency(figures, latency):
    if latency is None:
        return figures
    return replace(figures, latency=latency.median, spread=latency.spread)


def _is_ready(model):
    return all(quantizer.calibrated for quantizer in quantizers_of(model))


def _checked_original(original, graph):
    """Return the graph of the float model, or None where none was given."""
    if original is None:
        return None
    found = trace(original)
    if any(isinstance(node.op, (CompressedLayer, FakeQuantize)) for node in found.nodes):
        raise ValueError(
            "Expected the float model that was compressed. "
            f"Received: original='{original.name}', which is compressed itself."
        )
    shapes = [[(e.name, tuple(e.shape)) for e in each.inputs] for each in (graph, found)]
    if [shape for _, shape in shapes[0]] != [shape for _, shape in shapes[1]]:
        raise ValueError(
            f"Expected the float model that was compressed, with the inputs {shapes[0]}. "
            f"Received: original='{original.name}' with {shapes[1]}."
        )
    return found


def _checked_history(history):
    """Return training curves as {name: list of floats}."""
    if history is None:
        return {}
    curves = getattr(history, "history", history)
    if not isinstance(curves, dict):
        raise TypeError(
            "Expected a `keras.callbacks.History`, what `fit` returns, or a dict {name: list of "
            f"numbers}}. Received: history={history!r} (of type {type(history).__name__})"
        )
    found = {}
    for name, values in curves.items():
        try:
            found[str(name)] = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ValueError(
                f"Expected one number per epoch. Received: history[{name!r}]={values!r}"
            ) from None
    return found


def _check_sensitivity(sensitivity):
    if sensitivity is None:
        return
    wanted = ("metric", "baseline", "compressed", "layers", "suggestion")
    missing = [name for name in wanted if not hasattr(sensitivity, name)]
    if missing:
        raise TypeError(
            f"Expected the result of a sensitivity analysis, with {', '.join(wanted)}. "
            f"Received: sensitivity={sensitivity!r} without {', '.join(missing)}"
        )


def _sensitivity_dict(sensitivity):
    if sensitivity is None:
        return None
    rows = [
        {"layer": each.layer, "value": each.value, "drop": each.drop} for each in sensitivity.layers
    ]
    tip = sensitivity.suggestion
    return {
        "metric": sensitivity.metric,
        "baseline": sensitivity.baseline,
        "compressed": sensitivity.compressed,
        "layers": rows,
        "suggestion": tip and {"ignored_scopes": list(tip.ignored_scopes), "value": tip.value},
    }


def _sizes(model):
    if not isinstance(model, CompressedModel):
        return ()
    algorithms = [a for a in model.config.algorithms if isinstance(a, FilterPruning)]
    return tuple(size for algorithm in algorithms for size in algorithm.sizes(model))


def _figure_table(figures):
    """Return the table of `ModelFigures`: one row each."""
    metrics = list(dict.fromkeys(name for each in figures for name in each.metrics))
    table = Table("", title="Figures", title_justify="left", box=box.SIMPLE)
    for header in (*metrics, "parameters", "FLOPs", "bytes", "IR files", "ms per call"):
        table.add_column(header, justify="right")
    for each in figures:
        numbers = (each.parameters, each.flops, each.bytes, each.file_bytes)
        table.add_row(
            each.name,
            *(_or_empty(each.metrics.get(name), "{:.4f}") for name in metrics),
            *(_or_empty(number, "{:,}") for number in numbers),
            _or_empty(each.latency, "{:.3f}"),
        )
    return table


def _filters_text(layer):
    if layer.filters is None:
        return ""
    return f"{layer.filters_kept}/{layer.filters}"


def _or_empty(value, text):
    return "" if value is None else text.format(value)


def _bits_text(bits, has_weights):
    return str(bits) if bits is not None else "float" if has_weights else ""


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
