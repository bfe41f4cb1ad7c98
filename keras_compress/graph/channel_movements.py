"""Channel rules of operations that move values: they are run on the labels of the channels."""

import math

import keras
import numpy as np

from keras_compress.graph.channel_labels import UNARY, Channels, freeze, kind
from keras_compress.graph.walk import OPS_BY_NAME, Edge, Role
from keras_compress.layers import FakeQuantize

UNKNOWN_SIZE = 2  # stands in for an axis of unknown length


def movement(labels, node, given):
    """Run the operation on the labels, spread over the whole tensor."""
    carried = given[: len(node.carried)]
    if all(each is None for each in carried):
        return [None] * len(node.outputs)
    if None in carried:
        return freeze(labels, node, given, f"'{node.name}' joins them with what keeps its size")
    samples, results = _samples(node)
    tensors = {}
    for edge, each in zip(node.inputs, given, strict=True):
        spread = _spread(edge, each, samples if edge in node.carried else results)
        tensors[edge] = keras.ops.convert_to_tensor(spread)

    def fill(leaf):
        return tensors[leaf] if isinstance(leaf, Edge) else leaf

    args, kwargs = keras.tree.map_structure(fill, (list(node.args), node.kwargs))
    try:
        outputs = keras.tree.flatten(node.op(*args, **kwargs))
    except Exception:  # whatever an operation raises on stand-ins for unknown sizes
        return freeze(labels, node, given)
    arrays = [keras.ops.convert_to_numpy(each).astype("int64") for each in outputs]
    return [_gathered(labels, node, *pair) for pair in zip(node.outputs, arrays, strict=True)]


def _samples(node):
    """Return how many samples to give to an operation, and how many it then makes.

    A reshape may make several of one, or one of several.
    """
    if "Reshape" not in (kind(node.op), getattr(node.op, "operation", "")):
        return 1, 1
    size, target = (math.prod(_sizes(edge, 1)[1:]) for edge in (node.inputs[0], node.output))
    common = math.gcd(size, target)
    return target // common, size // common


def _sizes(edge, batch):
    return [edge.shape[0] or batch, *(size or UNKNOWN_SIZE for size in edge.shape[1:])]


def _spread(edge, channels, batch):
    """Return labels in the shape of a tensor; float32, exact below 2**24."""
    shape = _sizes(edge, batch)
    if channels is None:
        return np.zeros(shape, "float32")
    along = [1] * len(shape)
    along[channels.axis] = -1
    return np.broadcast_to(channels.labels.astype("float32").reshape(along), shape).copy()


def _gathered(labels, node, edge, array):
    """Return the `Channels` of moved labels: along one axis, unified over all others.

    Where they vary along two axes, a tensor keeps its shape only if whole rows or columns go: heads
    where the tensor leads to an attention product, the longer axis otherwise, the last of equals.
    """
    axes = [i for i in range(array.ndim) if (array != array.take([0], axis=i)).any()]
    known = [i for i in axes if edge.shape[i] is not None]
    if not known or 0 in axes:
        labels.freeze(array, f"'{node.name}' moves them out of line")
        return None
    axis = max(known, key=lambda i: (array.shape[i], i))
    if len(known) > 1 and leads_to_product(edge):
        axis = known[-2]
    rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    if len(axes) > 1:
        rows = np.unique(rows, axis=0)
    for row in rows[1:] if len(axes) > 1 else ():
        labels.unify(rows[0], row)
    return Channels(axis - array.ndim, rows[0])


def leads_to_product(edge, depth=6):
    """Whether a tensor is an operand of a product of two tensors, as queries and keys are."""
    for node in edge.consumers if depth else ():
        if kind(node.op) in ("Matmul", "Einsum", "DotProductAttention"):
            return True
        passes = OPS_BY_NAME.get(kind(node.op)) in (Role.MOVEMENT, Role.ARITHMETIC)
        passes = passes or isinstance(node.op, FakeQuantize) or kind(node.op) in UNARY
        passes = passes or kind(node.op) in ("Repeat", "Permute")
        if passes and any(leads_to_product(output, depth - 1) for output in node.outputs):
            return True
    return False


def along_others(labels, node, given):
    """Operations along one axis: as it is only where that is another one."""
    source, rank = given[0], len(node.inputs[0].shape)
    if source is not None and (
        node.op.axis is None or source.axis % rank in np.atleast_1d(node.op.axis) % rank
    ):
        return freeze(labels, node, given, f"'{node.name}' moves along their axis")
    return movement(labels, node, given)


def get_item(labels, node, given):
    """Channels in a row may be taken out of others; where in the row they are must not matter."""
    source = given[0]
    if source is not None:
        parts, at = key_along(node, source.axis)
        size = len(source.labels)
        if at is not None and not (
            isinstance(parts[at], slice) and parts[at].indices(size)[2] == 1
        ):
            return freeze(labels, node, given, f"'{node.name}' takes single ones of them")
    return movement(labels, node, given)


def key_along(node, axis):
    """Return (parts of the key of a `GetItem`, index of that along an axis of its tensor or None).

    An ellipsis among the parts is spelled out.
    """
    source, key = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs["key"]
    rank = len(source.shape)
    parts = list(key) if isinstance(key, tuple) else [key]
    spelled = next((i for i, part in enumerate(parts) if part is Ellipsis), None)
    if spelled is not None:
        named = sum(part is not None for part in parts) - 1
        parts[spelled : spelled + 1] = [slice(None)] * (rank - named)
    along = [i for i, part in enumerate(parts) if part is not None]
    return parts, along[axis % rank] if axis % rank < len(along) else None


def stack(labels, node, given):
    """Stacked tensors have the same channels; the new axis has none."""
    found = [each for each in given if each is not None]
    if not found:
        return [None]
    first = found[0]
    if len(found) < len(given) or any(
        each.axis != first.axis or len(each.labels) != len(first.labels) for each in found
    ):
        return freeze(labels, node, given, f"'{node.name}' joins them with what keeps its size")
    for each in found[1:]:
        labels.unify(first.labels, each.labels)
    rank = len(node.output.shape)
    behind = node.op.axis % rank > first.axis % (rank - 1)
    return [Channels(first.axis - 1 if behind else first.axis, first.labels)]
