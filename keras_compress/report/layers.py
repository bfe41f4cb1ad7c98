"""The layers of a report: parameters, FLOPs, bits, bytes, zeros and filters of each."""

import dataclasses
import math

import keras
import numpy as np

from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.compressed_layer import CompressedLayer, layer_spec
from keras_compress.export.integer_weights import integer_weight
from keras_compress.graph.flops import flops
from keras_compress.graph.walk import Role
from keras_compress.quantizers import Quantizer, SymmetricQuantizer, stored_bytes

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
        sparsity: fraction of the weights that it multiplies by, or looks up, that is zero as it
            uses them, masked and rounded, in [0, 1]; biases do not count. None without such
            weights.
        filters: channels of its output, those that pruning has taken away included; None for a
            layer that does not multiply by weights.
        filters_kept: those of them that are left: not masked, and not removed.
        latency_share: share of the IR's time, in [0, 1]; None unless measured. An operation that
            runs fused into another one has no time of its own.
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
    sparsity: float | None = None
    filters: int | None = None
    filters_kept: int | None = None
    latency_share: float | None = None


def layer_reports(graph, plan, latency_shares=None):
    """Return the `LayerReport`s of a graph in order, without layers that have nothing to say.

    Args:
        graph: the `Graph`.
        plan: `Plan.to_dict()` of a compressed model, or an empty dict.
        latency_shares: {layer: share of the latency}, or None.
    """
    reasons = {entry["layer"]: entry["reason"] for entry in plan.get("untouched", ())}
    counts = {}
    for node in graph.nodes:
        counts[node.name] = counts.get(node.name, 0) + flops(node)
    filters = _filters(graph, plan)
    rows = []
    for name, node in graph.layer_nodes().items():
        if node.role is Role.FAKE_QUANTIZE:
            continue
        row = _layer_report(node, counts[name], reasons.get(name, node.reason))
        if row.parameters or row.flops or row.reason:
            full, kept = filters.get(name, (None, None))
            share = None if latency_shares is None else latency_shares.get(name, 0.0)
            measured = {"filters": full, "filters_kept": kept, "latency_share": share}
            rows.append(dataclasses.replace(row, **measured))
    return tuple(rows)


def _layer_report(node, count, reason):
    op = node.op
    compressed = isinstance(op, CompressedLayer)
    weights = op.plain_weights if compressed else getattr(op, "weights", [])
    parameters = sum(math.prod(weight.shape) for weight in weights)
    integers = _trained_integers(op) if compressed else _found_integers(op)
    saved = sum(size * FLOAT_BYTES - stored for _, size, stored in integers)
    widths = [_edge_bits(edge) for edge in node.inputs if edge.is_float]
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
        sparsity=_sparsity(op),
    )


def _sparsity(op):
    values = _used_weights(op).values()
    size = sum(value.size for value in values)
    return sum(int((value == 0).sum()) for value in values) / size if size else None


def _used_weights(op):
    """Return {attribute: array} of the weights that a layer multiplies by, as it does."""
    spec = layer_spec(op)
    if spec is None:
        return {}
    if isinstance(op, CompressedLayer):
        return {name: op.effective_weight(name) for name in spec.weights}
    tensors = {name: keras.ops.convert_to_tensor(spec.read(op, name)) for name in spec.weights}
    return {name: keras.ops.convert_to_numpy(tensor) for name, tensor in tensors.items()}


def _filters(graph, plan):
    """Return {layer: (channels of its output in all, those that are left)}."""
    weighted = [node for node in graph.layer_nodes().values() if node.role is Role.WEIGHTED]
    masked = MaskedGraph.of(graph)
    if masked is None:
        return {node.name: (_width(node.op),) * 2 for node in weighted}
    planned = {group["name"]: group["channels"] for group in plan.get("groups", ())}
    # How many there were at first for each that there is now: shrinking has removed the others.
    weights = np.ones(masked.coupling.count)
    for group in masked.coupling.groups:
        weights[group.channels] = planned.get(group.name, group.size) / group.size
    found = {}
    for node in weighted:
        if node.output in masked.coupling.edges:
            _, channels = masked.coupling.edges[node.output]
            kept = int(masked.keep[channels].sum())
            found[node.name] = (round(float(weights[channels].sum())), kept)
        else:
            found[node.name] = (_width(node.op),) * 2
    return found


def _width(op):
    """Return the number of output channels of a layer that multiplies by weights."""
    if hasattr(op, "units"):
        return op.units
    spec = layer_spec(op)
    name = next(iter(spec.weights))
    shape = spec.read(op, name).shape
    return math.prod(shape[axis] for axis in spec.channel_axes(op, name))


def _trained_integers(layer):
    """Return (bits, size, bytes in OpenVINO IR) of every quantized weight of a layer."""
    rows = []
    for weight in layer_spec(layer).weights:
        size = math.prod(layer.raw_weight(weight).shape)
        for quantizer in layer.transforms_of(weight):
            if isinstance(quantizer, Quantizer) and not quantizer.is_on:
                continue
            if isinstance(quantizer, SymmetricQuantizer):
                steps = math.prod(quantizer.scale.shape)
                stored = stored_bytes(size, quantizer.stored_bits, steps)
                rows.append((quantizer.bits, size, stored))
            elif isinstance(quantizer, Quantizer):  # whether its grid has an offset, values tell
                axes = layer_spec(layer).channel_axes(layer, weight)
                found = integer_weight(layer.effective_weight(weight), axes)
                rows.append((quantizer.bits, size, _found_bytes(size, found)))
    return rows


def _found_integers(op):
    """As `_trained_integers`, from the values of a plain layer's weights alone."""
    rows = []
    for name, values in _used_weights(op).items():
        spec = layer_spec(op)
        axes = (spec.channel_axes(op, name, is_product) for is_product in (False, True))
        grids = (integer_weight(values, each) for each in dict.fromkeys(axes))
        found = next((grid for grid in grids if grid is not None), None)
        if found is not None:
            rows.append((int(found.storage[1:]), values.size, _found_bytes(values.size, found)))
    return rows


def _found_bytes(size, found):
    """Bytes in OpenVINO IR of an `IntegerWeight`, or None; with an offset it is stored in float."""
    if found is None or found.offset.any():
        return FLOAT_BYTES * size
    return stored_bytes(size, int(found.storage[1:]), found.step.size)


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
