"""The forward pass as TensorFlow runs it: what every exported format is made from."""

import json
import math

import keras
import numpy as np

from keras_compress.binary_quantizers import BinaryActivations
from keras_compress.compressed_layer import CompressedLayer
from keras_compress.graph.rebuild import deep_graphs, rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import all_layers, unique_name
from keras_compress.layers import FakeQuantize
from keras_compress.strip import strip

CODES = 256  # levels of the integer type that inference engines compute with
# Slope of a step between two levels; a power of two, so that multiplying by it rounds nothing.
# OpenVINO's CPU plugin gives wrong numbers, or does not compile, from 2^24 on (2026.4).
STEEP = 2.0**20


class FixedQuantizer(FakeQuantize):
    """Base of the layers that take the place of a `FakeQuantize` in a deployable model.

    Its range is constant there. What is not switched on yet, of staged quantizers, does nothing.
    """

    def fixed(self, tf, x):
        """Return a float32 tensor rounded, in operations that converters know."""
        raise NotImplementedError(f"{type(self).__name__} must define `fixed`.")

    def call(self, inputs, training=None):
        import tensorflow as tf

        with tf.init_scope():  # out of the graph being recorded: values, not operations
            is_on = self.quantizer.is_on
        if not is_on:
            return inputs
        return tf.cast(self.fixed(tf, tf.cast(inputs, tf.float32)), inputs.dtype)


class FixedFakeQuantize(FixedQuantizer):
    """A grid of equal steps.

    Inference engines compute with 256 levels only. A narrower grid is a clip to its own range
    followed by a 256-level grid of the same step, which gives the same numbers:

        y == fake_quantize(clip(x, low, high), wide_low, wide_high),   256 levels
        wide_low, wide_high = step * (0, 255), or step * (-128, 127) where low < 0

    Ranges per channel run as float arithmetic.
    """

    def fixed(self, tf, x):
        with tf.init_scope():
            low, high = self.quantizer.effective_range()
            step = self.quantizer.step()
        levels = self.quantizer.levels
        per_channel = step.size > 1
        if levels < CODES or per_channel:
            x = tf.clip_by_value(x, low, high)
        if per_channel:
            return tf.floor(x / step + 0.5) * step
        return tf.quantization.fake_quant_with_min_max_vars(x, *wide_range(low, high, step, levels))


class FixedBinarize(FixedQuantizer):
    """Zero or the scale s, as x lies below or above a threshold d:

        y == fake_quantize(clip((x - d) * 2^20 + 3/8 s, 0, s), 0, 255 s),   256 levels

    y is exactly 0 or s, and 0 where x == d: it becomes s where the clipped number is above s / 2,
    which is 2^-23 of the scale (1e-7) above the threshold. Float32 rounds the sums before it by as
    much.

    OpenVINO's CPU plugin joins this with the convolution before it, and the one behind it computes
    in integers. It refuses a grid of 2 levels, and runs a choice between two values by itself.

    Where x lies on a grid of its own, the slope spans half a step between two of its values: in
    OpenVINO IR that is a single `FakeQuantize` (see `join_binarizers`).

    Args:
        input_step: step of the grid that x lies on; None where it lies on none.
        **kwargs: as for `FakeQuantize`.
    """

    def __init__(self, input_step=None, **kwargs):
        super().__init__(**kwargs)
        self.input_step = input_step

    def fixed(self, tf, x):
        with tf.init_scope():
            zero, slope, scale = binary_slope(self.quantizer, self.input_step)
        y = tf.clip_by_value((x - zero) * slope, 0.0, scale)
        return tf.quantization.fake_quant_with_min_max_vars(y, 0.0, (CODES - 1) * scale)


def wide_range(low, high, step, levels):
    """Return (low, high), as floats, of the 256-level grid that holds a grid of fewer levels."""
    low, high, step = (float(np.reshape(value, ())) for value in (low, high, step))
    if levels == CODES:
        return low, high
    zero = round(-low / step)
    if low < 0 and max(zero, levels - zero) <= CODES // 2:
        zero = CODES // 2
    return -zero * step, (CODES - 1 - zero) * step


def binary_slope(quantizer, input_step):
    """Return the floats (zero, slope, scale) of `FixedBinarize`: `(x - zero) * slope` is clipped.

    Args:
        quantizer: `BinaryActivations`.
        input_step: step of the grid that x lies on, or None.
    """
    scale, cutoff = float(quantizer.step()), float(quantizer.cutoff())
    if input_step is None:
        return cutoff - 3 / 8 * scale / STEEP, STEEP, scale
    step = np.float32(input_step)
    zero = float((np.floor(np.float32(cutoff) / step) + 0.25) * step)
    return zero, float(2 * scale / step), scale


class BatchedDense(CompressedLayer, keras.layers.Dense):
    """A `Dense` layer as one matrix product, whatever the rank of its input.

    Keras' own flattens the leading axes and restores them. Inference engines move quantization
    steps through these operations, which OpenVINO's CPU plugin fails to do between two products.
    """

    def call(self, inputs, training=None):
        import tensorflow as tf

        outputs = tf.matmul(tf.cast(inputs, self.kernel.dtype), self.kernel)
        return self.activation(outputs if self.bias is None else outputs + self.bias)


class CausalConv1D(CompressedLayer, keras.layers.Conv1D):
    """A causal `Conv1D` that pads along two axes, as images are padded.

    OpenVINO's CPU plugin moves quantization steps through such a padding, but not through that of
    one axis: the convolution would be computed in float, and what follows it wrong.
    """

    def call(self, inputs):
        import tensorflow as tf

        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        padded = tf.pad(inputs[:, None], [[0, 0], [0, 0], [before, 0], [0, 0]])
        outputs = tf.nn.conv2d(
            padded,
            self.kernel[None],
            strides=(1, self.strides[0]),
            padding="VALID",
            dilations=(1, self.dilation_rate[0]),
        )[:, 0]
        return self.activation(outputs if self.bias is None else outputs + self.bias)


class MatrixEinsumDense(CompressedLayer, keras.layers.EinsumDense):
    """An `EinsumDense` that sums over the last axes of its input, as one matrix product.

    TensorFlow writes the sum out in operations on the sizes of the axes. Where one of them is not
    known before the model runs, OpenVINO's CPU plugin would compute the product in float.
    """

    def call(self, inputs, training=None):
        import tensorflow as tf

        summed, kept = _summed_and_kept(self.equation)
        sizes = self.kernel.shape[:summed], self.kernel.shape[summed:]
        kernel = tf.reshape(self.kernel, [math.prod(size) for size in sizes])
        leading = [-1 if n is None else n for n in inputs.shape[1 : len(inputs.shape) - summed]]
        shape = [tf.shape(inputs)[0], *leading]
        if summed > 1:
            inputs = tf.reshape(inputs, [*shape, kernel.shape[0]])
        outputs = tf.matmul(tf.cast(inputs, kernel.dtype), kernel)
        if kept > 1:
            outputs = tf.reshape(outputs, [*shape, *sizes[1]])
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)


def _summed_and_kept(equation):
    """Return how many axes an `EinsumDense` sums over and adds, the last ones, or None."""
    given, _, output = equation.replace(" ", "").partition("->")
    given, kernel = given.split(",")
    summed = len([label for label in kernel if label in given])
    batch = given[: len(given) - summed]
    ordered = (given, output) == (batch + kernel[:summed], batch + kernel[summed:])
    return (summed, len(kernel) - summed) if ordered and "." not in equation else None


def deployable(model):
    """Return a flat Functional model of plain Keras layers, lists of tensors in and out.

    Weights are baked in, activation quantizers are constants, and everything computes in float32.

    Args:
        model: compressed, stripped or plain Keras model.
    """

    def fixed(node):
        op = node.op
        if isinstance(op, FakeQuantize):
            config = op.get_config() | {"name": node.name, "dtype": "float32"}
            if isinstance(op.quantizer, BinaryActivations):
                return FixedBinarize.from_config(config | {"input_step": input_step(node)})
            return FixedFakeQuantize.from_config(config)
        cls = _deployed_class(node)
        half = getattr(op, "compute_dtype", None) in ("float16", "bfloat16")
        if cls is not type(op) or (half and not node.reason):
            return cls.from_config(op.get_config() | {"name": node.name, "dtype": "float32"})
        return None

    flat = rebuild(trace(strip(model)), swap=fixed)
    with deep_graphs():
        return keras.Model(list(flat.inputs), list(flat.outputs), name=flat.name)


def input_step(node):
    """Return the step of the grid that what a node reads was rounded to, a float, or None."""
    producer = node.inputs[0].producer
    op = producer.op if producer is not None else None
    if not isinstance(op, FakeQuantize) or not op.quantizer.is_on:
        return None
    step = op.quantizer.step()
    return float(step) if step.size == 1 else None


def _deployed_class(node):
    """Return the class that computes in a form that converters and engines do well with."""
    op = node.op
    if type(op) is keras.layers.Dense and len(node.inputs[0].shape) > 2:
        return BatchedDense
    if type(op) is keras.layers.Conv1D and (op.padding, op.groups) == ("causal", 1):
        return CausalConv1D
    if type(op) is keras.layers.EinsumDense and _summed_and_kept(op.equation):
        is_known = node.inputs[0].shape[1:].count(None) <= 1
        return MatrixEinsumDense if is_known else type(op)
    return type(op)


def signature_names(model):
    """Return (input names, output names) of a model, in order and unique.

    Input names are those of its `keras.Input` tensors, output names those of the layers that make
    them; outputs of a subclassed model that no layer makes are `output_0` and so on.
    """
    graph = trace(model)
    outputs = getattr(model, "output_names", None)
    if outputs is None:
        outputs = [_output_name(edge, index) for index, edge in enumerate(graph.outputs)]
    inputs = [edge.name for edge in graph.inputs]
    taken = set()
    # A layer may give several outputs, an input be one.
    unique = [unique_name(name, taken) for name in inputs + outputs]
    return unique[: len(inputs)], unique[len(inputs) :]


def _output_name(edge, index):
    from_layer = edge.producer and isinstance(edge.producer.op, keras.layers.Layer)
    return edge.name if from_layer else f"output_{index}"


def serving_function(model, input_names, output_names):
    """Return a `tf.function` from the model's input tensors to a dict of its outputs.

    Args:
        model: a model made by `deployable`.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
    """
    import tensorflow as tf

    specs = [
        tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name=name)
        for tensor, name in zip(model.inputs, input_names, strict=True)
    ]

    @tf.function(input_signature=specs, autograph=False)
    def serve(*inputs):
        outputs = keras.tree.flatten(model(list(inputs), training=False))
        named = zip(output_names, outputs, strict=True)
        return {name: tf.identity(output) for name, output in named}

    return serve


def write_saved_model(model, path, input_names, output_names, metadata):
    """Write a SavedModel directory whose `serving_default` signature has the given names.

    Args:
        model: a model made by `deployable`.
        path: the directory to make.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
        metadata: JSON-able dict, written to `assets.extra/keras_compress.json`.
    """
    import tensorflow as tf

    holder = tf.Module()
    holder.model_variables = [variable.value for variable in model.variables]
    holder.tables = [
        value
        for layer in all_layers(model)
        for value in vars(layer).values()
        if isinstance(value, (tf.lookup.StaticHashTable, tf.lookup.experimental.MutableHashTable))
    ]
    holder.serve = serving_function(model, input_names, output_names)
    tf.saved_model.save(holder, str(path), signatures=holder.serve)
    extra = path / "assets.extra"
    extra.mkdir()
    (extra / "keras_compress.json").write_text(json.dumps(metadata, indent=2) + "\n")
