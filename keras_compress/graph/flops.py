"""Floating-point operations of a graph's nodes, one sample through the model."""

import math

import keras

from keras_compress.compressed_layer import CompressedLayer, is_weighted, layer_spec
from keras_compress.graph.walk import Role

MATRIX_PRODUCTS = ("Matmul", "Einsum", "Dot", "DotProductAttention")


class Shapes:
    """The shapes that FLOPs are counted with: those of the graph as it is.

    `Narrowing` gives others: those of the graph without some of its channels.
    """

    def shape(self, edge):
        """Return the shape of an edge."""
        return tuple(edge.shape)

    def weight_shape(self, layer, weight, shape):
        """Return the shape of a layer's weight, which has `shape` in the graph as it is."""
        return tuple(shape)


AS_THEY_ARE = Shapes()


def flops(node, shapes=AS_THEY_ARE):
    """Return the FLOPs of one node for one sample: two per multiply-accumulate.

    Formula: convolution `2 * prod(kernel) * in/groups * out * prod(output positions)`; dense
    `2 * in * out * prod(leading positions)`; recurrent `2 * (in + units) * gates * units * steps`;
    element-wise and normalization one per output value. A layer kept whole is taken to use every
    matrix of its weights once per output position. Unknown sizes (`None`) count as 1.
    """
    if node.role in (Role.MOVEMENT, Role.FAKE_QUANTIZE, Role.PARAMETER):
        return 0
    results = [shapes.shape(edge) for edge in node.outputs]
    outputs = sum(map(_size, results))
    if is_weighted(node.op):
        return _weighted_flops(node, shapes)
    if type(node.op).__name__ in MATRIX_PRODUCTS and node.inputs:
        return 2 * outputs * (shapes.shape(node.inputs[0])[-1] or 1)
    if node.role is not Role.FLOAT:
        return outputs
    weights = sum(math.prod(w.shape) for w in getattr(node.op, "weights", ()) if len(w.shape) > 1)
    positions = max(_size(shape[:-1]) for shape in results)
    return max(outputs, 2 * weights * positions)


def total_flops(graph, shapes=AS_THEY_ARE):
    """Return the FLOPs of the whole graph for one sample."""
    return sum(flops(node, shapes) for node in graph.nodes)


def _weighted_flops(node, shapes):
    layer = node.op
    if isinstance(layer, keras.layers.Embedding) and not node.kwargs.get("reverse"):
        return 0
    # A transposed convolution uses every weight once per *input* position, the others per output.
    transposed = type(layer).__name__.endswith("Transpose")
    source, result = shapes.shape(node.inputs[0]), shapes.shape(node.output)
    spec = layer_spec(layer)
    kernels = [
        shapes.weight_shape(node.name, name, _shape(spec, layer, name)) for name in spec.weights
    ]
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, labels = layer.equation.replace(" ", "").partition("->")[0].split(",")
        shared = math.prod(
            d for d, label in zip(kernels[0], labels, strict=True) if label in inputs
        )
        return 2 * math.prod(kernels[0]) * (_size(source) // max(shared, 1))
    if isinstance(layer, keras.layers.RNN):
        return sum(2 * math.prod(kernel) * (source[1] or 1) for kernel in kernels)
    if not hasattr(layer, "data_format"):
        positions = _size(result[:-1])
        return sum(2 * math.prod(kernel) * positions for kernel in kernels)
    channels_first = layer.data_format == "channels_first"
    positions = source if transposed else result
    positions = positions[2:] if channels_first else positions[1:-1]
    return sum(2 * math.prod(kernel) * _size((None, *positions)) for kernel in kernels)


def _shape(spec, layer, name):
    compressed = isinstance(layer, CompressedLayer)  # whose transforms need not run for a shape
    return (layer.raw_weight(name) if compressed else spec.read(layer, name)).shape


def _size(shape):
    """Number of values of one sample: the batch axis and unknown axes count as 1."""
    return math.prod(dim or 1 for dim in shape[1:])
