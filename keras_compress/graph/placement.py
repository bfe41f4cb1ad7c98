"""Where activation quantizers go: which edges are rounded, and which of them share one scale.

The rules, in the order in which they are applied:

1. Every input of an operation that can run in integers wants an integer edge.
2. What runs as one operation is rounded at its end alone: batch normalization and activations
   after a convolution, activations after an addition, and an addition after a convolution, of
   whose two operands only the other one is rounded.
3. A want moves up through operations that only move data, as long as everything that reads the
   moved tensor wants integers too.
4. One quantizer per tensor; everything that wants integers reads the rounded tensor.
5. Tensors that meet in a concatenation, moved or not, share one quantizer, so that it stays data
   movement.
"""

import dataclasses

import keras

from keras_compress.graph.walk import Role
from keras_compress.layer_specs import CONVOLUTIONS

# Element-wise functions that an integer runtime evaluates in float when nothing is before them
# to fuse with; a plain ReLU is a clip and costs nothing either way.
CLIPS = ("ReLU", "Relu", "Relu6")
# Layers that do nothing at inference.
TRANSPARENT = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)
PRODUCTS = ("Matmul", "Einsum", "Dot")
ELEMENTWISE = ("Add", "Subtract", "Multiply", "Maximum", "Minimum")


@dataclasses.dataclass(frozen=True)
class QuantizedEdge:
    """A group of edges that share one quantizer, with the (node, edge) pairs that read it.

    The reader of a model output is the pair (None, edge).
    """

    edges: tuple
    readers: frozenset


def quantized_edges(graph, wanted, outputs=False, apart=frozenset()):
    """Choose the edges to round.

    Args:
        graph: the `Graph`.
        wanted: function `node -> bool`: whether a weighted node is to run in integers.
        outputs: whether the model's outputs are rounded too.
        apart: names of nodes that run in integers too, but whose inputs are rounded by others.

    Returns:
        List of `QuantizedEdge` in order of production.
    """
    wants = {(node, edge) for node, edge in _wants(graph, wanted) if node.name not in apart}
    if outputs:
        wants |= {(None, edge) for edge in graph.outputs if edge.is_float}
    targets = {edge for _, edge in wants}
    moved = _move_up(graph, wants, targets)
    groups = _unify(graph, targets, moved)
    readers = {edge: {(n, e) for n, e in wants if e is edge} for edge in targets}
    return [
        QuantizedEdge(tuple(group), frozenset().union(*(readers[edge] for edge in group)))
        for group in groups
    ]


def _wants(graph, wanted):
    """Rules 1 and 2: the set of (node, edge) pairs where a node wants an integer input."""
    return {
        (node, edge)
        for node in graph.nodes
        if _wants_integer(node, wanted)
        for edge in node.inputs
        if edge.is_float and edge is not _accumulated(node, wanted, graph.outputs)
    }


def _wants_integer(node, wanted):
    role = node.role
    if role is Role.WEIGHTED:
        return node.is_integer_product and wanted(node)
    if role is Role.ARITHMETIC:
        return wanted(node) and not _has_constant_operand(node) and not _makes_scores(node)
    if role is Role.NORMALIZATION:
        return wanted(node) and folded_into(node) is None
    if role is Role.ACTIVATION:
        return (
            type(node.op).__name__ not in CLIPS
            and not _is_linear(node.op)
            and wanted(node)
            and folded_into(node) is None
        )
    return False


def folded_into(node):
    """Return the node that a normalization or activation runs fused with, or None.

    A node folds into the one before it when it is that one's only reader and that one is a
    weighted operation without an activation of its own, or (for an activation) an arithmetic one,
    or a normalization.
    """
    before = node.inputs[0].producer if node.inputs else None
    if before is None or len(set(before.output.consumers)) > 1:
        return None
    if before.role is Role.WEIGHTED:
        return before if _is_linear(before.op) else None
    if node.role is Role.ACTIVATION and before.role in (Role.ARITHMETIC, Role.NORMALIZATION):
        return before
    return None


def _accumulated(node, wanted, outputs):
    """Return the input of an addition that stays in the accumulator of a convolution, or None.

    An integer convolution (with its batch normalization) that only the addition reads runs as one
    operation with it: the other operand is added before anything is rounded. Where both operands
    are such, it is the second.
    """
    if type(node.op).__name__ != "Add" or len(node.inputs) != 2:
        return None
    edges = [edge for edge in node.inputs if edge.shape == node.output.shape]
    return next((e for e in edges[::-1] if e not in outputs and _is_convolved(e, wanted)), None)


def _is_convolved(edge, wanted):
    """Whether an integer convolution makes a tensor, through batch normalization at most."""
    node = edge.producer
    if node is None or len(edge.consumers) != 1:
        return False
    if isinstance(node.op, TRANSPARENT):
        return _is_convolved(node.inputs[0], wanted)
    if node.role is Role.NORMALIZATION:
        node = folded_into(node)
    return node is not None and isinstance(node.op, CONVOLUTIONS) and wanted(node)


def _has_constant_operand(node):
    """Whether a two-operand operation shifts or scales one tensor by a constant or a variable."""
    operands = node.inputs
    if type(node.op).__name__ in ELEMENTWISE:
        operands = [e for e in operands if not e.producer or e.producer.role is not Role.PARAMETER]
    return type(node.op).__name__ in (*ELEMENTWISE, *PRODUCTS) and len(operands) < 2


def _makes_scores(node):
    """Whether an element-wise operation leads to a softmax alone, as the masking of scores does.

    A large negative number marks what is masked: no grid holds it and the scores.
    """
    if type(node.op).__name__ in PRODUCTS:
        return False
    readers = node.output.consumers
    return bool(readers) and all(_is_softmax(r.op) or _passes_scores(r) for r in readers)


def _passes_scores(node):
    elementwise = node.role in (Role.ARITHMETIC, Role.MOVEMENT)
    return (elementwise or type(node.op).__name__ in ("Where", "Cast")) and _makes_scores(node)


def _is_softmax(op):
    is_activation = getattr(op, "activation", None) is keras.activations.softmax
    return type(op).__name__ == "Softmax" or (
        is_activation and isinstance(op, keras.layers.Activation)
    )


def _is_linear(op):
    activation = getattr(op, "activation", None)
    return activation is None or activation is keras.activations.linear


def _move_up(graph, wants, targets):
    """Rule 3, in place on `wants` and `targets`; returns the data-moving nodes passed through."""
    outputs = set(graph.outputs)
    moved = set()
    for node in reversed(graph.nodes):
        if node.role is not Role.MOVEMENT or not any(e in targets for e in node.outputs):
            continue
        sources = [edge for edge in node.carried if edge.is_float]
        readers_agree = all(
            edge in targets
            and edge not in outputs
            and all((reader, edge) in wants for reader in edge.consumers)
            for edge in node.outputs
        )
        if not readers_agree or not sources:
            continue
        moved.add(node)
        for edge in node.outputs:
            targets.discard(edge)
            wants -= {(reader, edge) for reader in edge.consumers}
        for edge in sources:
            targets.add(edge)
            wants.add((node, edge))
    return moved


def _unify(graph, targets, moved):
    """Rules 4 and 5: group the target edges that data movement leads into one tensor."""
    leader = {edge: edge for edge in graph.edges}

    def find(edge):
        while leader[edge] is not edge:
            edge = leader[edge]
        return edge

    for node in moved:
        # Values are on one grid before and after: through every edge, rounded itself or not.
        first, *others = (e for e in [*node.carried, *node.outputs] if e.is_float)
        for edge in others:
            leader[find(edge)] = find(first)
    groups = {}
    for edge in graph.edges:
        if edge in targets:
            groups.setdefault(find(edge), []).append(edge)
    return list(groups.values())
