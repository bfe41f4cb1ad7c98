"""In which precision a compiled model runs its weighted operations, and what share of its FLOPs."""

import dataclasses
import math

WEIGHTED = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "Gather", "RNNSeq")
EIGHT_BITS = ("i8", "u8")
INDICES = ("i32", "i64")  # shapes and positions are looked up by `Gather` too


@dataclasses.dataclass(frozen=True)
class LayerPrecision:
    """One weighted operation as the runtime executes it.

    Attributes:
        layer: name of the Keras layer, where it could be told, else the runtime's name.
        type: what the runtime calls the operation.
        precision: type of its inputs, such as `u8` or `f32`.
        flops: two per multiply-accumulate, for one sample.
    """

    layer: str
    type: str
    precision: str
    flops: int = 0

    @property
    def eight_bit(self):
        """Whether it runs in 8 bits."""
        return self.precision in EIGHT_BITS


def layer_precisions(compiled, layer_names=()):
    """Return a `LayerPrecision` per weighted operation of a compiled model, in execution order.

    Args:
        compiled: `openvino.CompiledModel`.
        layer_names: names of the Keras layers, to recognize operations by.
    """
    layers = set(layer_names)
    found = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind, precision, originals = (
            str(info[key].value) if key in info else ""
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        if kind in WEIGHTED and precision not in INDICES and not _selects(op, kind):
            names = originals.split(",") if originals else [op.get_friendly_name()]
            owners = [name.split("/")[0] for name in names if name.split("/")[0] in layers]
            flops = operation_flops(op, kind)
            found.append(LayerPrecision((owners or names)[0], kind, precision, flops))
    return tuple(found)


def _selects(op, kind):
    """Whether an operation picks from what the model computes, not from a table of weights."""
    source = op.input_value(0).get_node()
    return kind == "Gather" and source.get_rt_info()["layerType"].value != "Const"


def eight_bit_share(layers):
    """Return the share, in [0, 1], of the FLOPs of weighted operations that runs in 8 bits."""
    total = sum(layer.flops for layer in layers)
    return sum(layer.flops for layer in layers if layer.eight_bit) / total if total else 0.0


def operation_flops(op, kind):
    """Return the FLOPs of an executed operation for one sample: two per multiply-accumulate.

    Only convolutions and matrix products count; the batch and unknown sizes count as 1.

    Args:
        op: node of the runtime model; its second input is the kernel or the other matrix.
        kind: its `layerType`.
    """
    if kind == "Convolution":
        return 2 * _size(op.input(1)) * _size(op.output(0), start=2)
    if kind == "Deconvolution":
        return 2 * _size(op.input(1)) * _size(op.input(0), start=2)
    if kind in ("FullyConnected", "MatMul"):
        return 2 * _size(op.output(0)) * _dimension(op.input(0).get_partial_shape()[-1])
    return 0


def _size(port, start=0):
    shape = port.get_partial_shape()
    return math.prod(_dimension(shape[i]) for i in range(start, len(shape)))


def _dimension(dimension):
    return dimension.get_length() if dimension.is_static else 1
