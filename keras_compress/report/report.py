"""What a model is made of: parameters, FLOPs, bits and bytes per layer, and why some stay float."""

import dataclasses
import math

import keras
from rich import box
from rich.console import Group
from rich.table import Table

from keras_compress.algorithms import FilterPruning
from keras_compress.compressed_layer import CompressedLayer, layer_spec
from keras_compress.compressed_model import CompressedModel
from keras_compress.export.integer_weights import integer_weight
from keras_compress.graph.flops import flops
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import Role
from keras_compress.plan import size_table
from keras_compress.quantizers import Quantizer, SymmetricQuantizer
from keras_compress.rendering import Rendered

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer of a report.

    Attributes:
        layer: name.
        type: class of the Keras layer, of the plain one where it is compressed.
        parameters: number of weights; ranges of quantizers are not counted.
        flops: per sample, over all calls of the layer.
        weight_bits: width of the quantized weights, the widest if they differ; None where all
            weights are float, or there are none.
        activation_bits: width of the input, the widest if they differ; None where it is float.
        bytes_before: size of the weights in float32.
        bytes_after: size as OpenVINO IR stores them: whole numbers of 1, 2, 4 or 8 bits and a
            float32 step per range; weights without a quantizer, or on a grid with an offset, are
            float32.
        reason: why the layer was left in float, where it was.
    """

    layer: str
    type: str
    parameters: int
    flops: int
    weight_bits: int | None
    activation_bits: int | None
    bytes_before: int
    bytes_after: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Report(Rendered):
    """What a model is made of, layer by layer; made by `report`.

    Attributes:
        model: name of the model.
        layers: tuple of `LayerReport` in execution order, masked filters included.
        sizes: tuple of `SizeEntry`: what is left without the filters that masks switch off.
    """

    model: str
    layers: tuple
    sizes: tuple = ()

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

    def share(self, layer):
        """Return the share of the model's FLOPs that a `LayerReport` has, in [0, 1]."""
        return layer.flops / max(self.flops, 1)

    def to_dict(self):
        """Return the report as JSON-able data."""
        totals = ("parameters", "flops", "bytes_before", "bytes_after", "float_share")
        return {
            "model": self.model,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "left_alone": [
                {"layer": layer.layer, "reason": layer.reason, "share": self.share(layer)}
                for layer in self.left_alone
            ],
            "sizes": [dataclasses.asdict(size) | {"level": size.level} for size in self.sizes],
            **{name: getattr(self, name) for name in totals},
        }

    def renderable(self):
        parts = [self._layer_table()]
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
        ratio = self.bytes_after / max(self.bytes_before, 1)
        for header, footer, justify in (
            ("layer", "total", "left"),
            ("type", "", "left"),
            ("parameters", f"{self.parameters:,}", "right"),
            ("FLOPs", f"{self.flops:,}", "right"),
            ("weight bits", "", "right"),
            ("input bits", "", "right"),
            ("float32 bytes", f"{self.bytes_before:,}", "right"),
            ("IR bytes", f"{self.bytes_after:,} ({ratio:.1%})", "right"),
        ):
            table.add_column(header, footer, justify=justify)
        for layer in self.layers:
            table.add_row(
                layer.layer,
                layer.type,
                f"{layer.parameters:,}",
                f"{layer.flops:,}",
                _bits_text(layer.weight_bits, otherwise="float" if layer.parameters else ""),
                _bits_text(layer.activation_bits, otherwise="float" if layer.weight_bits else ""),
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
            )
        return table

    def _total(self, name):
        return sum(getattr(layer, name) for layer in self.layers)


def report(model):
    """Say what a Keras model is made of.

    In a compressed model the widths are those of its quantizers. In a stripped or plain model the
    width of a weight is found in its values, as export finds it: 8, 4, 2 bits or 1 if they lie on
    such a grid.

    Args:
        model: any built Keras model: compressed, stripped or plain.

    Returns:
        A `Report`: a table in a terminal or notebook, a dictionary through `.to_dict()`.

    Raises:
        TypeError, ValueError: not a Keras model, or not built.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    >>> report(model).parameters, report(model).flops, report(model).bytes_before
    (15, 24, 60)
    """
    graph = trace(model)
    plan = model.plan if isinstance(model, CompressedModel) else {}
    reasons = {entry["layer"]: entry["reason"] for entry in plan.get("untouched", ())}
    counts = {}
    for node in graph.nodes:
        counts[node.name] = counts.get(node.name, 0) + flops(node)
    layers = tuple(
        _layer_report(node, counts[node.name], reasons.get(node.name, node.reason))
        for node in graph.layer_nodes().values()
        if node.role is not Role.FAKE_QUANTIZE
    )
    shown = (layer for layer in layers if layer.parameters or layer.flops or layer.reason)
    return Report(graph.name, tuple(shown), _sizes(model))


def _sizes(model):
    if not isinstance(model, CompressedModel):
        return ()
    algorithms = [a for a in model.config.algorithms if isinstance(a, FilterPruning)]
    return tuple(size for algorithm in algorithms for size in algorithm.sizes(model))


def _layer_report(node, count, reason):
    op = node.op
    compressed = isinstance(op, CompressedLayer)
    weights = op.plain_weights if compressed else getattr(op, "weights", [])
    parameters = sum(math.prod(weight.shape) for weight in weights)
    integers = _trained_integers(op) if compressed else _found_integers(op)
    saved = sum(size * FLOAT_BYTES - stored for _, size, stored in integers)
    widths = [_edge_bits(edge) for edge in node.inputs if edge.dtype.startswith(("float", "bfl"))]
    return LayerReport(
        layer=node.name,
        type=(op.keras_class if compressed else type(op)).__name__,
        parameters=parameters,
        flops=count,
        weight_bits=max((bits for bits, *_ in integers), default=None),
        activation_bits=max(widths) if widths and None not in widths else None,
        bytes_before=FLOAT_BYTES * parameters,
        bytes_after=FLOAT_BYTES * parameters - saved,
        reason=reason,
    )


def _trained_integers(layer):
    """Return (bits, size, bytes in OpenVINO IR) of every quantized weight of a layer."""
    rows = []
    for weight in layer_spec(layer).weights:
        size = math.prod(layer.raw_weight(weight).shape)
        for quantizer in layer.transforms_of(weight):
            if isinstance(quantizer, Quantizer) and not quantizer.is_on:
                continue
            if isinstance(quantizer, SymmetricQuantizer):
                stored = _stored_bytes(size, _stored_bits(quantizer), quantizer.scale)
                rows.append((quantizer.bits, size, stored))
            elif isinstance(quantizer, Quantizer):  # whether its grid has an offset, values tell
                axes = layer_spec(layer).channel_axes(layer, weight)
                found = integer_weight(layer.effective_weight(weight), axes)
                rows.append((quantizer.bits, size, _found_bytes(size, found)))
    return rows


def _found_integers(op):
    """As `_trained_integers`, from the values of a plain layer's weights alone."""
    spec = layer_spec(op)
    rows = []
    for name in spec.weights if spec is not None else ():
        values = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(spec.read(op, name)))
        axes = (spec.channel_axes(op, name, is_product) for is_product in (False, True))
        grids = (integer_weight(values, each) for each in dict.fromkeys(axes))
        found = next((grid for grid in grids if grid is not None), None)
        if found is not None:
            rows.append((int(found.storage[1:]), values.size, _found_bytes(values.size, found)))
    return rows


def _stored_bits(quantizer):
    """Width of the type in OpenVINO IR that holds the codes of a symmetric quantizer."""
    if quantizer.levels <= 4:
        return 2
    return 4 if quantizer.level_low >= -8 and quantizer.level_high <= 7 else 8


def _found_bytes(size, found):
    """Bytes in OpenVINO IR of an `IntegerWeight`, or None; with an offset it is stored in float."""
    if found is None or found.offset.any():
        return FLOAT_BYTES * size
    return _stored_bytes(size, int(found.storage[1:]), found.step)


def _stored_bytes(size, bits, steps):
    return math.ceil(size * bits / 8) + FLOAT_BYTES * math.prod(steps.shape)


def _edge_bits(edge):
    """Width of the grid a tensor lies on, also through data movement; None for float."""
    node = edge.producer
    if node is None or node.role not in (Role.FAKE_QUANTIZE, Role.MOVEMENT):
        return None
    if node.role is Role.FAKE_QUANTIZE:
        quantizer = node.op.quantizer
        return quantizer.bits if quantizer.is_on else None
    widths = [_edge_bits(source) for source in node.inputs]
    return max(widths) if widths and None not in widths else None


def _bits_text(bits, otherwise):
    return otherwise if bits is None else str(bits)
