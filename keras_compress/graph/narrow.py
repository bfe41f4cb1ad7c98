"""What changes in the operations of a graph when channels are taken out.

Weights are cut by `Coupling.kept_positions`; here are the arguments that say how wide something is:
the `filters` of a convolution, the shape of a reshape, the sections of a split.
"""

import math

import keras
import numpy as np

from keras_compress.graph.channel_labels import kind
from keras_compress.graph.channel_movements import key_along
from keras_compress.graph.flops import Shapes, total_flops
from keras_compress.graph.traced_layers import BatchSized, Parameter
from keras_compress.graph.walk import copy_operation
from keras_compress.layer_specs import CONVOLUTIONS, TRANSPOSED
from keras_compress.layers import CompressedLayer, FakeQuantize


class Narrowing(Shapes):
    """A graph with some of its channels taken out.

    Args:
        graph: the `Graph`.
        coupling: its `Coupling`.
        keep: bool array `(coupling.count,)`: the channels that stay.
    """

    def __init__(self, graph, coupling, keep):
        self.graph = graph
        self.coupling = coupling
        self.keep = keep
        self.cuts = coupling.kept_positions(keep)

    def touches(self, node):
        """Whether anything changes at a node."""
        edges = [*node.inputs, *node.outputs]
        return any(self.shape(edge) != tuple(edge.shape) for edge in edges)

    def shape(self, edge):
        """Return the shape of an edge of the narrow graph."""
        return self.coupling.edge_shape(edge, self.keep)

    def weight_shape(self, layer, weight, shape):
        """Return the shape of a layer's weight in the narrow graph."""
        narrow = list(shape)
        for axis, positions in self.cuts.get((layer, weight), {}).items():
            narrow[axis] = len(positions)
        return tuple(narrow)

    def flops(self):
        """Return the FLOPs of the narrow graph for one sample."""
        return total_flops(self.graph, self)

    def parameters(self):
        """Return the number of weights of the narrow graph, without the states of transforms."""
        return sum(
            math.prod(size if axis not in cut else len(cut[axis]) for axis, size in sizes)
            for sizes, cut in self._weights()
        )

    def _weights(self):
        """Yield ([(axis from the end, size)], {axis: positions}) of every weight of the graph."""
        for name, node in self.graph.layer_nodes().items():
            op = node.op
            if not isinstance(op, keras.layers.Layer) or isinstance(op, FakeQuantize):
                continue
            cuts = self.variables(op, name)
            for variable in op.plain_weights if isinstance(op, CompressedLayer) else op.weights:
                rank = len(variable.shape)
                cut = {a % rank - rank: at for a, at in cuts.get(id(variable), {}).items()}
                yield [(i - rank, size) for i, size in enumerate(variable.shape)], cut

    def configuration(self, node):
        """Return the arguments of a layer's constructor that change, as a dict."""
        if not self.touches(node):
            return {}
        op = node.op
        name = kind(op)
        if name in CONFIGURATIONS:
            return CONFIGURATIONS[name](self, node)
        own = op.keras_class if isinstance(op, CompressedLayer) else type(op)
        for base, make in LAYER_CONFIGURATIONS.items():
            if issubclass(own, base):
                return make(self, node)
        return {}

    def operation(self, node):
        """Return a bare operation with its new arguments, or None where it stays as it is."""
        change = OPERATIONS.get(kind(node.op))
        if change is None or isinstance(node.op, keras.layers.Layer) or not self.touches(node):
            return None
        twin = copy_operation(node.op, node.name)
        change(self, node, twin)
        return twin

    def arguments(self, node):
        """Return the (args, kwargs) of a node's call."""
        if kind(node.op) == "GetItem" and self.touches(node):
            return self._sliced(node)
        return node.args, node.kwargs

    def positions(self, edge):
        """Return (axis, bool array of the positions that stay) of an edge's channels."""
        axis, channels = self.coupling.edges[edge]
        return axis, self.keep[channels]

    def variables(self, layer, name):
        """Return {id of a variable of a layer: {axis: positions that stay}}.

        States of transforms are cut along with the weight that they belong to.
        """
        cuts = {}
        for (owner, weight), axes in self.cuts.items():
            if owner != name:
                continue
            for variable, along in _variables_of(layer, weight):
                ours = {along.index(axis): at for axis, at in axes.items() if axis in along}
                ours = {i: at for i, at in ours.items() if variable.shape[i] > max(at, default=-1)}
                if ours:
                    cuts[id(variable)] = ours
        return cuts

    def _sliced(self, node):
        """Slices along the axis of the channels start and stop after as many as are left."""
        source = node.args[0]
        if source not in self.coupling.edges:
            return node.args, node.kwargs
        axis, stay = self.positions(source)
        parts, at = key_along(node, axis)
        if at is not None:
            start, stop, _ = parts[at].indices(len(stay))
            parts[at] = slice(int(stay[:start].sum()), int(stay[:stop].sum()))
        return (source, tuple(parts)), {}


def _variables_of(layer, weight):
    """Yield (variable, axes of the weight that its axes belong to, counted from the end)."""
    if weight == "quantizer":
        for variable in layer.quantizer.range_variables:
            yield variable, _axes(variable)
        return
    if not isinstance(layer, CompressedLayer):
        variable = getattr(getattr(layer, "cell", layer), weight)
        yield variable, _axes(variable)
        return
    if weight not in layer.weight_names:
        variable = getattr(layer, weight)
        yield variable, _axes(variable)
        return
    variable = layer.raw_weight(weight)
    yield variable, _axes(variable)
    for transform in layer.transforms_of(weight):
        for state in transform.weights:
            yield state, transform.state_axes(state)


def _axes(variable):
    return tuple(range(-len(variable.shape), 0))


def _output_size(narrowing, node, axis=-1):
    return narrowing.shape(node.output)[axis]


def _convolution(narrowing, node):
    axis = -1 if node.op.data_format == "channels_last" else 1
    before, after = node.output.shape[axis], narrowing.shape(node.output)[axis]
    groups = getattr(node.op, "groups", 1)
    changed = {"filters": after}
    if groups > 1 and node.inputs[0].shape[axis] == groups:
        changed["groups"] = groups * after // before
    return changed


def _group_norm(narrowing, node):
    axis = node.op.axis
    before, after = node.output.shape[axis], narrowing.shape(node.output)[axis]
    return {"groups": after} if node.op.groups == before else {}


def _einsum_dense(narrowing, node):
    shape = narrowing.shape(node.output)[1:]
    old = node.op.get_config()["output_shape"]
    old = old if isinstance(old, (list, tuple)) else (old,)
    return {
        "output_shape": tuple(
            size if before is not None else None
            for before, size in zip(old, shape[len(shape) - len(old) :], strict=True)
        )
    }


def _target_shape(narrowing, node):
    return {"target_shape": _known(narrowing.shape(node.output)[1:])}


def _known(shape):
    return tuple(-1 if size is None else size for size in shape)


def _batch_sized(narrowing, node):
    op, edge = node.op, node.output
    if not isinstance(op.size, tuple) or op.function not in ("reshape", "broadcast_to"):
        return {}
    shape = narrowing.shape(edge)
    size = list(op.size)
    for index, (before, after) in enumerate(zip(edge.shape, shape, strict=True)):
        if before != after:
            size[index] = after
    return {"size": tuple(size)}


CONFIGURATIONS = {
    "Dense": lambda narrowing, node: {"units": _output_size(narrowing, node)},
    "EinsumDense": _einsum_dense,
    "GroupNormalization": _group_norm,
    "Reshape": _target_shape,
    "LayerScale": lambda narrowing, node: {"projection_dim": _output_size(narrowing, node)},
}
LAYER_CONFIGURATIONS = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), _convolution),
    keras.layers.Dense: CONFIGURATIONS["Dense"],
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Embedding: lambda narrowing, node: {
        "output_dim": narrowing.weight_shape(
            node.name, "embeddings", (node.op.input_dim, node.op.output_dim)
        )[1]
    },
    keras.layers.RNN: lambda narrowing, node: {"units": _output_size(narrowing, node)},
    Parameter: lambda narrowing, node: {"value_shape": narrowing.shape(node.output)},
    BatchSized: _batch_sized,
}


def _new_shape(narrowing, node, twin):
    shape = list(narrowing.shape(node.output))
    for index, size in enumerate(np.atleast_1d(node.op.newshape).tolist()):
        if size in (-1, None) and index < len(shape):
            shape[index] = -1
    twin.newshape = _known(shape)


def _broadcast_shape(narrowing, node, twin):
    twin.shape = narrowing.shape(node.output)


def _sections(narrowing, node, twin):
    rank = len(node.inputs[0].shape)
    axis, stay = narrowing.positions(node.inputs[0])
    if node.op.axis % rank != axis % rank:
        return
    sizes = [edge.shape[axis] for edge in node.outputs]
    bounds = np.cumsum(sizes)[:-1]
    twin.indices_or_sections = [int(stay[:bound].sum()) for bound in bounds]


OPERATIONS = {"Reshape": _new_shape, "BroadcastTo": _broadcast_shape, "Split": _sections}
