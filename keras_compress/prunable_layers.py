"""Layers whose weights and biases are switched off channel by channel: `Prunable*` classes.

A layer that normalizes over channels takes its statistics over those that are on, so that

    layer(x)[..., on] == smaller_layer(x[..., on])        layer(x)[..., off] == 0

`smaller_layer` being the plain layer that holds the channels that are on, and gamma and beta
having the same mask.
"""

import keras
from keras import ops

from keras_compress.compressed_layer import CompressedLayer, RecurrentWeights
from keras_compress.masks import ChannelMask

PRUNABLE_LAYERS = {}  # Keras layer class -> its Prunable class, filled by subclassing
SMALLEST_SHARE = 1e-7  # of a group's channels: where all are off, their mean shall be finite


class Prunable(CompressedLayer):
    """Mixin of the layers whose weights are masked; without transforms by default."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.keras_class is not None:
            PRUNABLE_LAYERS[cls.keras_class] = cls


class PrunableConv1D(Prunable, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose kernel and bias can be masked."""


class PrunableConv2D(Prunable, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose kernel and bias can be masked."""


class PrunableConv3D(Prunable, keras.layers.Conv3D):
    """`keras.layers.Conv3D` whose kernel and bias can be masked."""


class PrunableConv1DTranspose(Prunable, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose kernel and bias can be masked."""


class PrunableConv2DTranspose(Prunable, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose kernel and bias can be masked."""


class PrunableConv3DTranspose(Prunable, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` whose kernel and bias can be masked."""


class PrunableDepthwiseConv1D(Prunable, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose kernel and bias can be masked."""


class PrunableDepthwiseConv2D(Prunable, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose kernel and bias can be masked."""


class PrunableSeparableConv1D(Prunable, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` whose kernels and bias can be masked."""


class PrunableSeparableConv2D(Prunable, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` whose kernels and bias can be masked."""


class PrunableDense(Prunable, keras.layers.Dense):
    """`keras.layers.Dense` whose kernel and bias can be masked."""


class PrunableEinsumDense(Prunable, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` whose kernel and bias can be masked."""


class PrunableEmbedding(Prunable, keras.layers.Embedding):
    """`keras.layers.Embedding` whose vectors can be masked."""


class PrunableReversibleEmbedding(Prunable, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` whose vectors can be masked."""


class PrunableSimpleRNN(RecurrentWeights, Prunable, keras.layers.SimpleRNN):
    """`keras.layers.SimpleRNN` whose kernels and bias can be masked."""


class PrunableGRU(RecurrentWeights, Prunable, keras.layers.GRU):
    """`keras.layers.GRU` whose kernels and bias can be masked."""


class PrunableLSTM(RecurrentWeights, Prunable, keras.layers.LSTM):
    """`keras.layers.LSTM` whose kernels and bias can be masked."""


class PrunableBatchNormalization(Prunable, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose gamma and beta can be masked.

    Every channel has statistics of its own: they are those of the plain layer.
    """


class PrunableLayerNormalization(Prunable, keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization` over the channels that the mask of gamma leaves on.

    Without such a mask it is the plain layer. With one, `axis` must be a single axis.
    """

    def build(self, input_shape):
        _require_single_axis(self, "gamma")
        if self.rms_scaling and _masks(self, "gamma"):
            raise ValueError(
                f"Layer '{self.name}': expected no `rms_scaling` beside a mask of gamma. "
                "Use `keras.layers.RMSNormalization`."
            )
        super().build(input_shape)

    def call(self, inputs):
        if not _masks(self, "gamma"):
            return super().call(inputs)
        x, (axis,) = _in_float32(inputs), self.axis
        shape = _vector_shape(x, axis)
        mask = ops.reshape(_mask(self, "gamma", x.dtype), shape)
        mean, variance = _masked_moments(x, mask, axis)
        outputs = (x - mean) * ops.rsqrt(variance + self.epsilon)
        outputs = _affine(self, outputs, shape)
        return ops.cast(ops.cast(outputs, inputs.dtype), self.compute_dtype)


class PrunableGroupNormalization(Prunable, keras.layers.GroupNormalization):
    """`keras.layers.GroupNormalization` over the channels that the mask of gamma leaves on.

    Without such a mask it is the plain layer. A smaller layer can take its place only if the mask
    switches off the same number of channels in every group, which is for the caller to see to.
    """

    def call(self, inputs):
        if not _masks(self, "gamma"):
            return super().call(inputs)
        x = _in_float32(inputs)
        rank = len(x.shape)
        axis = self.axis % rank
        split = (self.groups, x.shape[axis] // self.groups)
        sizes = [-1, *ops.shape(x)[1:]]  # Keras wants the batch as -1, else known sizes get lost
        grouped = ops.reshape(x, (*sizes[:axis], *split, *sizes[axis + 1 :]))
        shape = [1] * axis + list(split) + [1] * (rank - axis - 1)
        mask = ops.reshape(_mask(self, "gamma", x.dtype), shape)
        over = [i for i in range(1, rank + 1) if i != axis]
        mean, variance = _masked_moments(grouped, mask, over)
        outputs = (grouped - mean) * ops.rsqrt(variance + self.epsilon)
        outputs = ops.reshape(_affine(self, outputs, shape), ops.shape(inputs))
        return ops.cast(ops.cast(outputs, inputs.dtype), self.compute_dtype)


class PrunableRMSNormalization(Prunable, keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization` over the channels that the mask of its scale leaves on.

    Without such a mask it is the plain layer. With one, `axis` must be the last one: along others
    the plain layer does not broadcast its scale.
    """

    def build(self, input_shape):
        _require_single_axis(self, "scale")
        axis = self.axis[0] if isinstance(self.axis, (list, tuple)) else self.axis
        if _masks(self, "scale") and axis not in (-1, len(input_shape) - 1):
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}): expected the last axis beside a "
                f"mask of scale. Received: axis={axis}"
            )
        super().build(input_shape)

    def call(self, inputs):
        if not _masks(self, "scale"):
            return super().call(inputs)
        x, (axis,) = _in_float32(inputs), self.axis
        shape = _vector_shape(x, axis)
        mask = ops.reshape(_mask(self, "scale", x.dtype), shape)
        square = _masked_mean(ops.square(x), mask, axis)
        scale = ops.reshape(ops.cast(self.scale, x.dtype), shape)
        return ops.cast(x * ops.rsqrt(square + self.epsilon) * scale, inputs.dtype)


def _masks(layer, weight):
    return [t for t in layer.transforms_of(weight) if isinstance(t, ChannelMask)]


def _mask(layer, weight, dtype):
    """Return the product of the masks of a vector, a tensor."""
    product = 1.0
    for mask in _masks(layer, weight):
        product = product * ops.cast(mask.variable(-1), dtype)
    return product


def _require_single_axis(layer, weight):
    axis = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if len(axis) > 1 and _masks(layer, weight):
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}): expected a single axis, that of the "
            f"channels, beside a mask of {weight}. Received: axis={list(axis)}"
        )


def _in_float32(inputs):
    return ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))


def _vector_shape(x, axis):
    """Return the shape that broadcasts a vector along one axis of x."""
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return shape


def _masked_mean(x, mask, axes):
    """Return the mean over `axes`, kept with size 1, of the values where the mask is 1."""
    share = ops.maximum(ops.mean(mask, axis=axes, keepdims=True), SMALLEST_SHARE)
    return ops.mean(x * mask, axis=axes, keepdims=True) / share


def _masked_moments(x, mask, axes):
    mean = _masked_mean(x, mask, axes)
    return mean, _masked_mean(ops.square(x - mean), mask, axes)


def _affine(layer, outputs, shape):
    """Multiply by gamma and add beta, where the layer has one, reshaped to `shape`."""
    outputs = outputs * ops.reshape(ops.cast(layer.gamma, outputs.dtype), shape)
    if layer.beta is None:
        return outputs
    return outputs + ops.reshape(ops.cast(layer.beta, outputs.dtype), shape)
