"""Make a new Keras model from a graph, swapping layers and rounding edges on the way.

Everything that changes a model's structure goes through here: `compress_model`, `strip`, export.
"""

import contextlib
import functools
import sys
import tempfile
import types

import keras
import numpy as np

from keras_compress.compressed_layer import CompressedLayer, clone_layer
from keras_compress.graph.record import definite_sizes
from keras_compress.graph.walk import Edge, all_layers, copy_operation
from keras_compress.replicas import laid_out_by_path

RECURSION_LIMIT = 20_000


def rebuild(graph, swap=None, quantize=(), model_class=keras.Model, narrowing=None, **model_kwargs):
    """Build a Keras Functional model from a graph; weights are copied, nothing is shared.

    Args:
        graph: the `Graph`. Its own layers are left untouched.
        swap: function `node -> Layer or None`, called once per operation. A returned, unbuilt
            layer takes the operation's place and weights; None keeps a clone of the operation.
        quantize: pairs `(QuantizedEdge, FakeQuantize layer)`. An edge may be in several, each with
            readers of its own.
        model_class: class of the new model, constructed as `model_class(inputs, outputs, name=)`.
        narrowing: `Narrowing` of the graph: which channels are taken out; None keeps all.
        **model_kwargs: further arguments of the model's constructor.

    Returns:
        The new model; layer names, input and output structure and names are the graph's.
    """
    quantizers = {}  # edge -> the layers that round it
    for group, layer in quantize:
        for edge in group.edges:
            quantizers.setdefault(edge, []).append(layer)
    chosen = {pair: layer for group, layer in quantize for pair in group.readers}
    tensors, rounded, layers = {}, {}, {}

    def emit(edge, tensor):
        tensors[edge] = tensor
        # The coarser quantizer reads what the finer one has rounded: engines keep one tensor less.
        for layer in sorted(quantizers.get(edge, ()), key=lambda each: -each.quantizer.bits):
            tensor = rounded[edge, layer] = layer(tensor)

    def read(node, leaf):
        if not isinstance(leaf, Edge):
            return leaf
        layer = chosen.get((node, leaf))
        return tensors[leaf] if layer is None else rounded[leaf, layer]

    for edge in graph.inputs:
        emit(edge, keras.Input(batch_shape=edge.shape, dtype=edge.dtype, name=edge.name))
    for node in graph.nodes:
        first_call = node.name not in layers
        if first_call:
            replacement = swap(node) if swap is not None else None
            layers[node.name] = replacement or _clone(node, narrowing)
        args, kwargs = (node.args, node.kwargs) if narrowing is None else narrowing.arguments(node)
        args, kwargs = keras.tree.map_structure(functools.partial(read, node), (list(args), kwargs))
        with definite_sizes([layers[node.name]]), laid_out_by_path(_sources(node)):
            outputs = keras.tree.flatten(layers[node.name](*args, **kwargs))
        if first_call and isinstance(node.op, keras.layers.Layer):
            cuts = {} if narrowing is None else narrowing.variables(node.op, node.name)
            copy_weights(node.op, layers[node.name], cuts)
        for edge, tensor in zip(node.outputs, outputs, strict=True):
            emit(edge, tensor)

    inputs = keras.tree.map_structure(lambda edge: tensors[edge], graph.input_structure)
    outputs = keras.tree.map_structure(functools.partial(read, None), graph.output_structure)
    with deep_graphs():
        return model_class(inputs, outputs, name=graph.name, **model_kwargs)


@contextlib.contextmanager
def deep_graphs():
    """Let Keras walk through deep models: it takes a few calls of Python's stack per layer."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _sources(node):
    """Return {path that a weight of the new layer will have: the weight of the node's layer}."""
    if not isinstance(node.op, keras.layers.Layer):
        return {}
    before = f"{node.op.path}/"
    return {f"{node.name}/{v.path.removeprefix(before)}": v for v in node.op.weights}


def _clone(node, narrowing):
    if isinstance(node.op, keras.layers.Layer):
        changed = {} if narrowing is None else narrowing.configuration(node)
        return clone_layer(node.op, node.name, changed)
    narrow = None if narrowing is None else narrowing.operation(node)
    return narrow or copy_operation(node.op, node.name)


def copy_weights(old, new, cuts=types.MappingProxyType({})):
    """Give `new` the weights of `old`: raw ones between two of a kind, effective ones to a plain
    layer.

    Values pass through NumPy: on JAX, `assign` would share the buffer with the old model.

    Args:
        old: a layer with weights.
        new: one of the same kind, plain or compressed.
        cuts: {id of a variable of `old`: {axis: positions that `new` has}}.
    """
    was_compressed, is_compressed = (isinstance(x, CompressedLayer) for x in (old, new))
    sources, values, targets = old.weights, old.get_weights(), new.weights
    if is_compressed and not was_compressed:
        targets = new.plain_weights
    elif was_compressed and not is_compressed:
        sources, values = old.plain_weights, old.plain_values()
    for target, source, value in zip(targets, sources, values, strict=True):
        target.assign(take(value, cuts.get(id(source), {})))
    _copy_assets(old, new)
    finalize_state(new)


def take(value, cuts):
    """Return an array with only some positions along some of its axes.

    Args:
        value: array.
        cuts: {axis: positions}.
    """
    for axis, positions in cuts.items():
        value = np.take(value, positions, axis=axis)
    return value


def _copy_assets(old, new):
    """Give layers, and every layer in them, what they save beside weights: adapted vocabularies."""
    pairs = zip([old, *all_layers(old)], [new, *all_layers(new)], strict=False)
    for before, after in pairs:
        if hasattr(before, "save_assets") and hasattr(after, "load_assets"):
            with tempfile.TemporaryDirectory() as folder:
                before.save_assets(folder)
                after.load_assets(folder)


def finalize_state(layer):
    """Let a layer, and every layer in it, take up weights that were assigned to it.

    `keras.layers.Normalization` computes with tensors made from its weights, not with these.
    """
    for inner in [layer, *all_layers(layer)]:
        if isinstance(inner, keras.layers.Normalization):
            inner.finalize_state()
