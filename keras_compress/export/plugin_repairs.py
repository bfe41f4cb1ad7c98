"""Rewrites of an IR that the CPU plugin would compute wrong, or unlike the trained model."""

import functools
from typing import NamedTuple

import numpy as np

# Operation -> axes of its weight that keep a step per index (output channels, groups).
CONVOLUTIONS = {
    "Convolution": (0,),
    "GroupConvolution": (0, 1),
    "ConvolutionBackpropData": (1,),
    "GroupConvolutionBackpropData": (0, 2),
}
ARITHMETIC = ("Add", "Multiply", "Subtract")
# Operations that the plugin runs as part of the convolution before them.
ACTIVATIONS = ("Relu", "Clamp", "Minimum", "Maximum", "PRelu", "Swish", "HSwish", "Elu", "Sigmoid")
CLIPS = ("Clamp", "Minimum", "Maximum")
SUMS = ("Add", "Subtract")
LARGE = 1e4  # what masks multiply by, at least
HIGHEST = np.finfo("float32").max
NEXT_TO_NOTHING = np.float32(1e-30)


def give_biases(ov_model):
    """Add a bias of next to nothing to integer products without one, in place; return how many.

    The step of such a product is a multiplication behind it. With no bias to end the product, the
    CPU plugin moves that multiplication into whatever float operations read it, and where several
    do, or a reduction, numbers come out wrong or the model does not compile. A bias is free.
    """
    from openvino import opset15

    given = 0
    for op in ov_model.get_ordered_ops():
        if not _has_integer_weights(op) or _is_shifted(op):
            continue
        shape = op.get_output_partial_shape(0)
        channel = len(shape) - 1 if op.get_type_name() == "MatMul" else 1
        sizes = [1] * len(shape)
        sizes[channel] = shape[channel].get_length()
        bias = opset15.constant(np.full(sizes, NEXT_TO_NOTHING))
        _put_behind(op, "bias", lambda op, bias=bias: opset15.add(op, bias))
        given += 1
    return given


def _has_integer_weights(op):
    """Whether an operation multiplies by a weight that `use_integer_weights` has written."""
    return op.get_type_name() in (*CONVOLUTIONS, "MatMul") and any(
        value.get_node().get_friendly_name().endswith("/dequantized") for value in op.input_values()
    )


def _is_shifted(op):
    """Whether a constant that is not zero is added to a product, behind scaling at most."""
    while True:
        readers = list(op.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() not in ARITHMETIC:
            return False
        op = readers[0].get_node()
        sources = [value.get_node() for value in op.input_values()]
        constants = [node for node in sources if node.get_type_name() == "Constant"]
        if not constants:
            return False
        if op.get_type_name() != "Multiply" and constants[0].data.any():
            return True


def keep_rounding(ov_model):
    """Keep the rounding of activations that are added to others, in place; return how many.

    Where a convolution's rounded output is added to another tensor and the sum is rounded again,
    the CPU plugin runs all of it as one operation and leaves the first rounding out: the IR would
    differ from the trained model by whole steps. A pooling of size one between the rounding and
    the addition keeps them apart; it moves 8-bit values once.
    """
    from openvino import opset15

    kept = 0
    for op in ov_model.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize" or not _is_added(op) or not _is_convolved(op):
            continue
        ones, zeros = ([value] * (len(op.get_output_partial_shape(0)) - 2) for value in (1, 0))
        pool = functools.partial(
            opset15.max_pool,
            strides=ones,
            dilations=ones,
            pads_begin=zeros,
            pads_end=zeros,
            kernel_shape=ones,
        )
        _put_behind(op, "rounded", pool)
        kept += 1
    return kept


def join_binarizers(ov_model):
    """Join `fake_quantize(clip((x - a) * b, 0, s))` into one operation, in place; return how many.

    It is how a tensor that is rounded already becomes zero or s. The CPU plugin would take `a` for
    a zero point and round it to the tensor's grid. One `FakeQuantize` says the same in its input
    range, from a to a + s / b.
    """
    from openvino import opset15

    joined = 0
    for op in ov_model.get_ordered_ops():
        slope = _slope_before(op)
        if slope is None or slope.source.get_type_name() != "FakeQuantize":
            continue
        levels = op.get_attributes()["levels"]
        scale = _value(op.input_value(2)) / (levels - 1)
        ends = (slope.zero, slope.zero + scale / slope.factor, 0.0, scale)
        single = opset15.fake_quantize(slope.source, *map(np.float32, ends), levels)
        single.set_friendly_name(op.get_friendly_name())
        for reader in op.output(0).get_target_inputs():
            reader.replace_source_output(single.output(0))
        joined += 1
    return joined


class _Slope(NamedTuple):
    """`(source - zero) * factor`, clipped."""

    source: object
    zero: float
    factor: float


def _slope_before(op):
    """Return the `_Slope` that a `FakeQuantize` reads, or None."""
    found = {}
    if op.get_type_name() != "FakeQuantize":
        return None
    for kinds in (CLIPS, ("Multiply",), ("Subtract",)):
        op = op.input_value(0).get_node()
        if op.get_type_name() not in kinds:
            return None
        if kinds[0] == "Clamp" and op.get_type_name() != "Clamp":
            op = op.input_value(0).get_node()  # a minimum of a maximum, or the other way round
            if op.get_type_name() not in kinds:
                return None
        found[kinds[0]] = op
    numbers = [found[name].input_value(1) for name in ("Subtract", "Multiply")]
    if any(value.get_node().get_type_name() != "Constant" for value in numbers):
        return None
    return _Slope(found["Subtract"].input_value(0).get_node(), *map(_value, numbers))


def _value(port):
    """Return the number that a constant of one element holds."""
    return float(np.ravel(port.get_node().data)[0])


def keep_masks(ov_model):
    """Keep what is added to a mask of large numbers, in place; return how many masks there are.

    In `(mask - 1) * 1e9 + bias` the CPU plugin joins the constants: `mask * 1e9 + (bias - 1e9)`, in
    which float32 has no room for the bias (the positions of T5's attention). It does not join
    them through a minimum, here with the largest number.
    """
    from openvino import opset15

    kept = 0
    for op in ov_model.get_ordered_ops():
        factor, shifted = _constant_operand(op, ("Multiply",))
        if factor is None or np.abs(factor).max() < LARGE:
            continue
        if _constant_operand(shifted, SUMS)[0] is not None and _has_reader(op, SUMS):
            _put_behind(op, "mask", lambda op: opset15.minimum(op, HIGHEST))
            kept += 1
    return kept


def keep_clips(ov_model):
    """Keep a clip apart from the scaling or shift per channel before it; return how many there are.

    Rounding to fewer than 8 bits is `fake_quantize(clip(x))`. The CPU plugin joins the two, and a
    `x * scale` or `x + shift` in front of them, and clips at the wrong place then: behind the bias
    of a `Conv1D`, say, half of the values are off by whole steps. A minimum in between, with the
    largest number, keeps them apart. What runs as part of a convolution is right.
    """
    from openvino import opset15

    kept = 0
    for op in ov_model.get_ordered_ops():
        factor, _ = _constant_operand(op, ARITHMETIC)
        if factor is None or factor.size == 1 or not _has_reader(op, CLIPS) or _is_convolved(op):
            continue
        _put_behind(op, "unclipped", lambda op: opset15.minimum(op, HIGHEST))
        kept += 1
    return kept


def _constant_operand(op, kinds):
    """Return (values of the constant operand, the other operand), or (None, None)."""
    if op.get_type_name() not in kinds:
        return None, None
    sources = [value.get_node() for value in op.input_values()]
    for constant, other in (sources, sources[::-1]):
        if constant.get_type_name() == "Constant" and constant.data.size:
            return constant.data, other
    return None, None


def _put_behind(op, name, make):
    """Let everything that reads an operation read `make(op)` instead, named after it."""
    readers = op.output(0).get_target_inputs()
    follower = make(op)
    follower.set_friendly_name(f"{op.get_friendly_name()}/{name}")
    for reader in readers:
        reader.replace_source_output(follower.output(0))


def _has_reader(op, kinds):
    readers = op.output(0).get_target_inputs()
    return any(reader.get_node().get_type_name() in kinds for reader in readers)


def _is_added(op):
    readers = list(op.output(0).get_target_inputs())
    return len(readers) == 1 and readers[0].get_node().get_type_name() in SUMS


def _is_convolved(op):
    """Whether a tensor comes from a convolution through bias, batch norm or activation alone."""
    while True:
        op = op.input_value(0).get_node()
        if op.get_type_name() in CONVOLUTIONS:
            return True
        if op.get_type_name() not in (*ARITHMETIC, *ACTIVATIONS):
            return False
