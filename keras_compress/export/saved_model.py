"""The forward pass as TensorFlow runs it: what every exported format is made from."""

import keras
import numpy as np

from keras_compress.compress import strip
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.layers import FakeQuantize

CODES = 256  # levels of the integer type that inference engines compute with


class FixedFakeQuantize(keras.layers.Layer):
    """A `FakeQuantize` layer with its trained range as constants, in the form converters know.

    Inference engines compute with 256 levels only. A narrower grid is a clip to its own range
    followed by a 256-level grid of the same step, which gives the same numbers:

        y == fake_quantize(clip(x, low, high), wide_low, wide_high),   256 levels
        wide_low, wide_high = step * (0, 255), or step * (-128, 127) where low < 0

    Ranges per channel and more than 256 levels run as float arithmetic.

    Args:
        quantizer: the trained `Quantizer`.
    """

    def __init__(self, quantizer, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.low, self.high = quantizer.effective_range()
        self.step = quantizer.step()
        self.levels = quantizer.levels

    def call(self, inputs):
        import tensorflow as tf

        x = tf.cast(inputs, tf.float32)
        if self.levels > CODES or np.size(self.step) > 1:
            codes = tf.floor(tf.clip_by_value(x, self.low, self.high) / self.step + 0.5)
            return tf.cast(codes * self.step, inputs.dtype)
        if self.levels < CODES:
            x = tf.clip_by_value(x, float(self.low), float(self.high))
        low, high = self.wide_range()
        return tf.cast(tf.quantization.fake_quant_with_min_max_vars(x, low, high), inputs.dtype)

    def wide_range(self):
        """Return (low, high) of the 256-level grid, as floats."""
        low, high, step = (float(np.reshape(a, ())) for a in (self.low, self.high, self.step))
        if self.levels == CODES:
            return low, high
        zero = round(-low / step)
        if low < 0 and zero <= 128 and self.levels - zero <= 128:
            zero = 128
        return -zero * step, (CODES - 1 - zero) * step

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)


def deployable(model):
    """Return a flat Functional model of plain Keras layers, lists of tensors in and out.

    Weights are baked in, activation quantizers are constants, and everything computes in float32.

    Args:
        model: compressed, stripped or plain Keras model.
    """

    def fixed(node):
        op = node.op
        if isinstance(op, FakeQuantize):
            return FixedFakeQuantize(op.quantizer, name=node.name) if op.quantizer.calibrated else None
        half = getattr(op, "compute_dtype", None) in ("float16", "bfloat16")
        if half and not node.reason:
            return type(op).from_config(op.get_config() | {"name": node.name, "dtype": "float32"})
        return None

    flat = rebuild(trace(strip(model)), swap=fixed)
    return keras.Model(list(flat.inputs), list(flat.outputs), name=flat.name)


def signature_names(model):
    """Return (input names, output names) of a model, in order and unique.

    Input names are those of its `keras.Input` tensors, output names those of the layers that make
    them.
    """
    graph = trace(model)
    outputs = getattr(model, "output_names", None) or [edge.name for edge in graph.outputs]
    return [edge.name for edge in graph.inputs], _unique(outputs)


def _unique(names):
    """Number the repetitions of a name: a layer may give several outputs."""
    unique = []
    for name in names:
        candidate, count = name, 0
        while candidate in unique:
            count += 1
            candidate = f"{name}_{count}"
        unique.append(candidate)
    return unique


def serving_function(model, input_names, output_names):
    """Return a `tf.function` from the model's input tensors to a dict of its outputs.

    Args:
        model: a model made by `deployable`.
        input_names, output_names: names of the tensors, in the model's order.
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


def write_saved_model(model, folder, input_names, output_names):
    """Write a SavedModel directory whose `serving_default` signature has the given names."""
    import tensorflow as tf

    serve = serving_function(model, input_names, output_names)
    holder = tf.Module()
    holder.variables_of_model = [variable.value for variable in model.variables]
    holder.serve = serve
    tf.saved_model.save(holder, str(folder), signatures=serve)
