"""Floating-point operations of a graph's nodes, one sample through the model."""

import math

import keras

from keras_compress.graph.walk import Role
from keras_compress.layers import layer_spec

MATRIX_PRODUCTS = ("Matmul", "Einsum", "Dot", "DotProductAttention")


def flops(node):
    """Return the FLOPs of one node for one sample: two per multiply-accumulate.

    Formula: convolution `2 * prod(kernel) * in/groups * out * prod(output positions)`; dense
    `2 * in * out * prod(leading positions)`; recurrent `2 * (in + units) * gates * units * steps`;
    element-wise and normalization one per output value. A layer kept whole is taken to use every
    matrix of its weights once per output position. Unknown sizes (`None`) count as 1.
    """
    if node.role in (Role.MOVEMENT, Role.FAKE_QUANTIZE, Role.PARAMETER):
        return 0
    outputs = sum(_size(edge.shape) for edge in node.outputs)
    if layer_spec(node.op) is not None:
        return _weighted_flops(node)
    if type(node.op).__name__ in MATRIX_PRODUCTS and node.inputs:
        return 2 * outputs * (node.inputs[0].shape[-1] or 1)
    weights = sum(math.prod(w.shape) for w in getattr(node.op, "weights", ()) if len(w.shape) > 1)
    positions = max(_size(edge.shape[:-1]) for edge in node.outputs)
    return max(outputs, 2 * weights * positions)


def total_flops(graph):
    """Return the FLOPs of the whole graph for one sample."""
    return sum(map(flops, graph.nodes))


def _weighted_flops(node):
    layer = node.op
    if isinstance(layer, keras.layers.Embedding) and not node.kwargs.get("reverse"):
        return 0
    # A transposed convolution uses every weight once per *input* position, the others per output.
    transposed = type(layer).__name__.endswith("Transpose")
    positions_of = node.inputs[0] if transposed else node.output
    spec = layer_spec(layer)
    kernels = [spec.read(layer, name).shape for name in spec.weights]
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, labels = layer.equation.replace(" ", "").partition("->")[0].split(",")
        shared = math.prod(
            d for d, label in zip(kernels[0], labels, strict=True) if label in inputs
        )
        return 2 * math.prod(kernels[0]) * (_size(node.inputs[0].shape) // max(shared, 1))
    if isinstance(layer, keras.layers.RNN):
        return sum(2 * math.prod(kernel) * (node.inputs[0].shape[1] or 1) for kernel in kernels)
    if not hasattr(layer, "data_format"):
        positions = _size(node.output.shape[:-1])
        return sum(2 * math.prod(kernel) * positions for kernel in kernels)
    channels_first = layer.data_format == "channels_first"
    positions = positions_of.shape[2:] if channels_first else positions_of.shape[1:-1]
    return sum(2 * math.prod(kernel) * _size((None, *positions)) for kernel in kernels)


def _size(shape):
    """Number of values of one sample: the batch axis and unknown axes count as 1."""
    return math.prod(dim or 1 for dim in shape[1:])
