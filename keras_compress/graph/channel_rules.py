"""How channels move through each operation: one rule per kind.

A rule is a function `(labels, node, given) -> results`: `given` has the `Channels` of every input
edge of the node, None where it has none, and `results` those of every output edge. What a rule
cannot follow it freezes, with a reason that the plan prints.
"""

import functools

import keras
import numpy as np

from keras_compress.graph.channel_labels import (
    FOLLOWING,
    PRODUCED,
    READ,
    UNARY,
    Channels,
    follow,
    freeze,
    kind,
    produce,
    read,
)
from keras_compress.graph.channel_movements import along_others, get_item, movement, stack
from keras_compress.graph.contractions import einsum, einsum_dense, matmul
from keras_compress.graph.traced_layers import BatchSized, Parameter, SetMask
from keras_compress.graph.walk import Edge
from keras_compress.layer_specs import CONVOLUTIONS, DEPTHWISE, TRANSPOSED
from keras_compress.layers import CompressedLayer, FakeQuantize

MERGES = "Add Subtract Multiply Maximum Minimum Where LogicalAnd LogicalOr".split()
SPATIAL = (
    "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D "
    "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D UpSampling1D "
    "UpSampling2D UpSampling3D Resizing Resize MaxPool AveragePool AdaptiveAveragePooling1D "
    "AdaptiveAveragePooling2D AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D "
    "AdaptiveMaxPooling3D"
).split()
GLOBAL_POOLING = tuple(f"Global{kind}Pooling{n}D" for kind in ("Average", "Max") for n in (1, 2, 3))
REDUCTIONS = "Mean Max Min Sum".split()
MOVEMENTS = (
    "Reshape Flatten Permute RepeatVector Transpose Squeeze ExpandDims Swapaxes Moveaxis "
    "Split Repeat Tile Flip Ravel BroadcastTo"
).split()
# Arguments that may be arrays, and where they are have the size of a tensor.
SCALARS = {"Clip": ("x_min", "x_max"), "Repeat": ("repeats",), "Rescaling": ("scale", "offset")}


def propagate(labels, node, given):
    """Return the `Channels` of every output of a node, None where it has none."""
    if node.reason:
        return freeze(labels, node, given, node.reason)
    if any(np.ndim(getattr(node.op, name)) for name in SCALARS.get(kind(node.op), ())):
        return freeze(labels, node, given, f"'{node.name}' has a value for each of them")
    results = _rule_of(node.op)(labels, node, given)
    for attribute in ("activation", "recurrent_activation"):
        activation = getattr(node.op, attribute, None)
        if activation is not None and not _is_elementwise(activation):
            name = getattr(activation, "__name__", type(activation).__name__)
            reason = f"the activation '{name}' of '{node.name}' mixes them"
            return freeze(labels, node, results, reason)
    return results


def _rule_of(op):
    """Return the rule of an operation: of its class, a base class, or by class name."""
    if isinstance(op, keras.layers.Layer):
        own = _known_class(op.keras_class if isinstance(op, CompressedLayer) else type(op))
        if own is None:
            return freeze
        found = next((LAYER_RULES[base] for base in own.__mro__ if base in LAYER_RULES), None)
        if found is not None:
            return found
    name = op.operation if isinstance(op, BatchSized) else kind(op)
    return NAMED_RULES.get(name, freeze)


def _known_class(cls):
    """Return the class of Keras, or of this package, that a user's class adds no method to."""
    while cls.__module__.partition(".")[0] not in ("keras", "keras_compress"):
        if any(map(callable, vars(cls).values())) or len(cls.__bases__) > 1:
            return None
        (cls,) = cls.__bases__
    return cls


@functools.cache
def _is_elementwise(activation):
    """Whether what a function gives for a value depends on that value alone: found by trial."""
    values = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    try:
        together = keras.ops.convert_to_numpy(activation(keras.ops.convert_to_tensor(values)))
        others = activation(keras.ops.convert_to_tensor(values.reshape(10, 2)))
        others = keras.ops.convert_to_numpy(others)
        at_zero = keras.ops.convert_to_numpy(activation(keras.ops.zeros((1, 2))))
    except Exception:  # whatever a user's function raises
        return False
    same = together.shape == values.shape and np.allclose(together.ravel(), others.ravel(), 1e-4)
    return bool(same and np.isfinite(at_zero).all())


def channel_axis(op, rank):
    """Return the channel axis of a layer's input, counted from the end."""
    layout = getattr(op, "data_format", None) or keras.config.image_data_format()
    return 1 - rank if layout == "channels_first" else -1


def _convolution(labels, node, given):
    layer, rank = node.op, len(node.output.shape)
    axis = channel_axis(layer, rank)
    summed, made = (-1, -2) if isinstance(layer, TRANSPOSED) else (-2, -1)
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        return _grouped_convolution(labels, node, given, axis, groups)
    read(labels, node, "kernel", summed, given[0], axis)
    found = produce(labels, node, "kernel", made, layer.filters)
    follow(labels, node, found, "bias")
    return [Channels(axis, found)]


def _grouped_convolution(labels, node, given, axis, groups):
    """Each group of filters reads its own channels; all groups must stay of one size.

    One channel per group is a depthwise convolution: groups go. Otherwise the channels at the same
    place in each group go together.
    """
    layer, (source,) = node.op, given
    per_group = node.inputs[0].shape[axis] // groups
    if source is not None and source.axis != axis:
        labels.freeze(source.labels, f"'{node.name}' reads another axis")
        source = None
    if per_group == 1:
        if source is None:
            return [None]
        found = np.repeat(source.labels, layer.filters // groups)
        labels.note(node, "kernel", -1, found, FOLLOWING)
        follow(labels, node, found, "bias")
        return [Channels(axis, found)]
    if source is not None:
        aligned = _same_in_each_group(labels, source.labels, groups)
        labels.note(node, "kernel", -2, aligned[:per_group], READ)
    found = produce(labels, node, "kernel", -1, layer.filters)
    _same_in_each_group(labels, found, groups)
    follow(labels, node, found, "bias")
    return [Channels(axis, found)]


def _same_in_each_group(labels, found, groups):
    rows = found.reshape(groups, -1)
    labels.unify(np.tile(rows[0], groups), found)
    return found


def _depthwise(labels, node, given):
    layer, (source,) = node.op, given
    axis = channel_axis(layer, len(node.output.shape))
    if source is None:
        return [None]
    if source.axis != axis:
        return freeze(labels, node, given, f"'{node.name}' reads another axis")
    labels.note(node, "kernel", -2, source.labels, FOLLOWING)
    found = np.repeat(source.labels, layer.depth_multiplier)
    follow(labels, node, found, "bias")
    return [Channels(axis, found)]


def _dense(labels, node, given):
    read(labels, node, "kernel", -2, given[0], -1)
    found = produce(labels, node, "kernel", -1, node.op.units)
    follow(labels, node, found, "bias")
    return [Channels(-1, found)]


def _embedding(labels, node, given):
    if node.kwargs.get("reverse"):
        if not node.op.tie_weights:
            own = Channels(-1, produce(labels, node, "embeddings", -1, node.op.output_dim))
            reason = f"'{node.name}' multiplies by weights of its own"
            return freeze(labels, node, [*given, own], reason)
        read(labels, node, "embeddings", -1, given[0], -1)
        return [None]
    freeze(labels, node, given)
    return [Channels(-1, produce(labels, node, "embeddings", -1, node.op.output_dim))]


def _recurrent(labels, node, given):
    layer = node.op
    gates = layer.cell.kernel.shape[-1] // layer.units
    read(labels, node, "kernel", -2, given[0], -1)
    units = produce(labels, node, "recurrent_kernel", -2, layer.units)
    labels.note(node, "kernel", -1, np.tile(units, gates), PRODUCED)
    labels.note(node, "recurrent_kernel", -1, np.tile(units, gates), PRODUCED)
    follow(labels, node, np.tile(units, gates), "bias")
    if layer.stateful:
        own = Channels(-1, units)
        return freeze(labels, node, [*given, own], f"'{node.name}' keeps its state between batches")
    for state in given[1:]:
        if state is None or state.axis != -1 or len(state.labels) != layer.units:
            freeze(labels, node, [state, Channels(-1, units)], f"an outer state of '{node.name}'")
        else:
            labels.unify(state.labels, units)
    return [Channels(-1, units) for _ in node.outputs]


def _parameter(labels, node, given):
    """A variable follows whatever it is added to or joined with, along its last axis."""
    shape = node.op.value_shape
    if not shape:
        return [None]
    known = labels.known(node, "value", -1)
    found = labels.new(shape[-1]) if known is None else known
    return [Channels(-1, labels.note(node, "value", -1, found, FOLLOWING))]


def _batch_norm(labels, node, given):
    (source, *_), rank = given, len(node.output.shape)
    if source is None:
        return [None]
    if node.op.axis not in (source.axis, source.axis + rank):
        return freeze(labels, node, given, f"'{node.name}' normalizes another axis")
    weights = ("gamma", "beta", "moving_mean", "moving_variance")
    follow(labels, node, source.labels, *weights)
    return [source]


def _layer_norm(labels, node, given):
    """Statistics over the channels: a masked layer takes them over those that are left."""
    layer, source = node.op, given[0]
    if source is None:
        return [None]
    scale = "scale" if isinstance(layer, keras.layers.RMSNormalization) else "gamma"
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else (layer.axis,)
    rank = len(node.output.shape)
    if {axis % rank for axis in axes} != {source.axis % rank}:
        return freeze(labels, node, given, f"'{node.name}' normalizes over other axes too")
    if getattr(layer, scale, None) is None:
        return freeze(labels, node, given, f"'{node.name}' has no scale to mask")
    if isinstance(layer, keras.layers.GroupNormalization):
        count = len(source.labels)
        if layer.groups != count:
            _same_in_each_group(labels, source.labels, layer.groups)
    follow(labels, node, source.labels, scale, "beta")
    return [source]


def _prelu(labels, node, given):
    source = given[0]
    if source is None:
        return [None]
    rank = len(node.output.shape)
    if node.op.alpha.shape[source.axis] == node.output.shape[source.axis] or rank == 1:
        labels.note(node, "alpha", source.axis, source.labels, FOLLOWING)
    return [source]


def _layer_scale(labels, node, given):
    """The layer of that name in `keras.applications`: one factor per channel."""
    source = given[0]
    if source is None:
        return [None]
    if source.axis != -1 or tuple(getattr(node.op, "gamma", np.zeros(0)).shape) != (
        len(source.labels),
    ):
        return freeze(labels, node, given)
    follow(labels, node, source.labels, "gamma")
    return [source]


def _fake_quantize(labels, node, given):
    source, quantizer = given[0], node.op.quantizer
    if source is not None and quantizer.axis and source.axis in quantizer.axis:
        labels.note(node, "quantizer", source.axis, source.labels, FOLLOWING)
    return [source]


def _unary(labels, node, given):
    freeze(labels, node, given[len(node.carried) :])
    return [given[0]]


def _masking(labels, node, given):
    """Steps whose channels all have the value are masked: those that are left must agree."""
    if node.op.mask_value != 0:
        return freeze(labels, node, given, f"'{node.name}' compares them all with a value")
    return given[:1]


def _softmax(labels, node, given):
    axes = getattr(node.op, "axis", -1)
    axes = axes if isinstance(axes, (list, tuple)) else (axes,)
    rank, source = len(node.output.shape), given[0]
    if source is not None and source.axis % rank in {axis % rank for axis in axes}:
        return freeze(labels, node, given, f"'{node.name}' (softmax) mixes them")
    _merge(labels, node, given)
    return [source]


def _merge(labels, node, given):
    """Element-wise operations unify the channels of their operands along the common axis."""
    found = [each for each in given if each is not None]
    if not found:
        return [None]
    axes = {each.axis for each in found}
    size = node.output.shape[found[0].axis] if len(axes) == 1 else None
    wide = [each for each in found if len(each.labels) == size]
    if size is None or not wide or _has_other_operand(node, given, found[0].axis):
        return freeze(labels, node, given, f"'{node.name}' joins them with what keeps its size")
    for each in found:
        if len(each.labels) == size:
            labels.unify(wide[0].labels, each.labels)
        else:  # one channel, repeated
            labels.freeze(each.labels, f"'{node.name}' repeats it")
    return [wide[0]]


def _average(labels, node, given):
    """The layer is a merge, the operation a reduction."""
    if isinstance(node.op, keras.layers.Layer):
        return _merge(labels, node, given)
    return freeze(labels, node, given) if len(given) > 1 else _reduction(labels, node, given)


def _divide(labels, node, given):
    """Zero may be divided, but not divided by."""
    for edge, each in zip(node.inputs, given, strict=True):
        if edge is not node.args[0] and each is not None:
            return freeze(labels, node, given, f"'{node.name}' divides by them")
    return _merge(labels, node, given)


def _power(labels, node, given):
    """Zero may be raised to a power where its gradient is finite."""
    exponent = node.args[1]
    if isinstance(exponent, Edge) or np.ndim(exponent) or exponent < 1:
        return freeze(labels, node, given)
    return given[:1]


def _has_other_operand(node, given, axis):
    """Whether an operand without channels has a value for each of them."""
    for edge, each in zip(node.inputs, given, strict=True):
        if each is None and len(edge.shape) >= -axis and edge.shape[axis] != 1:
            return True
    constants = keras.tree.flatten([list(node.args), node.kwargs])
    constants = [leaf for leaf in constants if not isinstance(leaf, (Edge, str, type(None)))]
    return any(np.ndim(leaf) >= -axis and np.shape(leaf)[axis] != 1 for leaf in constants)


def _concatenate(labels, node, given):
    found = [each for each in given if each is not None]
    if not found:
        return [None]
    rank = len(node.output.shape)
    joined, axes = node.op.axis % rank - rank, {each.axis for each in found}
    if len(axes) > 1:
        return freeze(labels, node, given, f"'{node.name}' joins tensors of other layouts")
    (axis,) = axes
    if axis != joined:
        return _merge(labels, node, given)
    parts = []
    for edge, each in zip(node.inputs, given, strict=True):
        if each is not None:
            parts.append(each.labels)
            continue
        fixed = labels.new(edge.shape[axis])
        labels.freeze(fixed, f"an operand of '{node.name}' keeps its size")
        parts.append(fixed)
    return [Channels(axis, np.concatenate(parts))]


def _spatial(labels, node, given):
    """Pooling, padding and the like move along the other axes."""
    (source, *_), axis = given, channel_axis(node.op, len(node.output.shape))
    if source is not None and source.axis != axis:
        return freeze(labels, node, given, f"'{node.name}' moves along their axis")
    return [source]


def _global_pooling(labels, node, given):
    (source, *_), rank = given, len(node.inputs[0].shape)
    if source is None:
        return [None]
    axis = channel_axis(node.op, rank)
    if source.axis != axis:
        return freeze(labels, node, given, f"'{node.name}' sums over them")
    return [Channels(axis if axis == -1 else 1 - len(node.output.shape), source.labels)]


def _reduction(labels, node, given):
    source, rank = given[0], len(node.inputs[0].shape)
    if source is None:
        return [None]
    axes = range(rank) if node.op.axis is None else np.atleast_1d(node.op.axis) % rank
    place = source.axis % rank
    if place in axes:
        return freeze(labels, node, given, f"'{node.name}' ({kind(node.op)}) mixes them")
    if not getattr(node.op, "keepdims", False):
        place -= sum(axis < place for axis in axes)
    return [Channels(place - len(node.output.shape), source.labels)]


def _pad(labels, node, given):
    source = given[0]
    widths = np.broadcast_to(np.asarray(node.op.pad_width), (len(node.output.shape), 2))
    if source is not None and widths[source.axis].any():
        return freeze(labels, node, given, f"'{node.name}' pads along their axis")
    return [source]


def _none(labels, node, given):
    """Masks and indices: nothing flows through."""
    freeze(labels, node, given)
    return [None] * len(node.outputs)


NAMED_RULES = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(MERGES, _merge),
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(GLOBAL_POOLING, _global_pooling),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(MOVEMENTS, movement),
    "GetItem": get_item,
    "Stack": stack,
    "Activation": _unary,
    "Concatenate": _concatenate,
    "Softmax": _softmax,
    "Pad": _pad,
    "Matmul": matmul,
    "Einsum": einsum,
    "Rescaling": _unary,
    "Average": _average,
    "Divide": _divide,
    "TrueDivide": _divide,
    "Power": _power,
    "Roll": along_others,
    "Take": along_others,
    "Unstack": along_others,
    "LayerScale": _layer_scale,
    "Masking": _masking,
}
LAYER_RULES = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(TRANSPOSED, _convolution),
    **dict.fromkeys(DEPTHWISE, _depthwise),
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: einsum_dense,
    keras.layers.Embedding: _embedding,
    keras.layers.SimpleRNN: _recurrent,
    keras.layers.GRU: _recurrent,
    keras.layers.LSTM: _recurrent,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.LayerNormalization: _layer_norm,
    keras.layers.GroupNormalization: _layer_norm,
    keras.layers.RMSNormalization: _layer_norm,
    keras.layers.PReLU: _prelu,
    Parameter: _parameter,
    FakeQuantize: _fake_quantize,
    SetMask: _unary,
}
