"""Masks: transforms that switch off whole channels of a weight."""

import numpy as np
from keras import ops

from keras_compress.replicas import total
from keras_compress.transforms import Transform


class ChannelMask(Transform):
    """Zeroes whole channels.

    Shapes: `x` any; one vector of ones and zeros per axis in `axes`, as long as x is along it.

    Formula, each mask broadcast along its axis, and gradient for an incoming g:

        y = x * mask_a * mask_b ...        dx = g * mask_a * mask_b ...

    Invariants: `m(0) == 0` and `m(m(x)) == m(x)`, exactly. A new mask is all ones.

    Args:
        axes: tuple of distinct negative ints: the axes whose indices can be switched off. The
            variable of axis -1 is named `mask_1`.
        **kwargs: as for a Keras layer.

    Example:

    >>> mask = ChannelMask(axes=(-1,))
    >>> mask.build((2, 3))
    >>> mask.set_mask(-1, [1, 0, 1])
    >>> mask(np.array([[1.0, 2.0, 3.0]], "float32")).numpy()
    array([[1., 0., 3.]], dtype=float32)
    """

    def __init__(self, axes=(-1,), **kwargs):
        super().__init__(**kwargs)
        self.axes = _checked_axes(axes)

    def build(self, input_shape):
        self._vectors = [
            self.add_weight(
                name=f"mask_{-axis}",
                shape=(_size(input_shape, axis),),
                initializer="ones",
                trainable=False,
            )
            for axis in self.axes
        ]

    def variable(self, axis):
        """Return the variable that holds the mask of one axis.

        Raises:
            ValueError: the axis has no mask, or none yet.
        """
        if axis not in self.axes:
            raise ValueError(f"Expected one of the axes {self.axes}. Received: axis={axis!r}")
        if not self.built:
            raise ValueError(
                f"Expected a mask that has been built. Received: '{self.name}' without variables."
            )
        return self._vectors[self.axes.index(axis)]

    def state_axes(self, variable):
        return (self.axes[[v is variable for v in self._vectors].index(True)],)

    def mask(self, axis):
        """Return the mask of one axis, a NumPy array of ones and zeros."""
        return np.array(ops.convert_to_numpy(self.variable(axis)))

    def set_mask(self, axis, values):
        """Set the mask of one axis.

        Args:
            axis: one of `axes`.
            values: one number per index of the axis: 1 where the channel is on, else 0.

        Raises:
            ValueError: there is no such axis, or `values` has another shape or other numbers.
        """
        variable = self.variable(axis)
        values = np.asarray(values, dtype="float32")
        if values.shape != tuple(variable.shape):
            raise ValueError(
                f"Expected one value per channel, shape {tuple(variable.shape)}. "
                f"Received: values of shape {values.shape}"
            )
        if not np.isin(values, (0.0, 1.0)).all():
            raise ValueError(f"Expected ones and zeros. Received: values={values}")
        variable.assign(values)

    def call(self, inputs, training=None):
        inputs = ops.convert_to_tensor(inputs)
        return inputs * self._factor(len(inputs.shape))

    def _factor(self, rank):
        """Return the product of the masks, a tensor that broadcasts with x."""
        factor = 1.0
        for axis, vector in zip(self.axes, self._vectors, strict=True):
            shape = [1] * rank
            shape[axis] = -1
            factor = factor * ops.reshape(ops.convert_to_tensor(vector), shape)
        return factor

    def get_config(self):
        return super().get_config() | {"axes": self.axes}


class TaylorMask(ChannelMask):
    """A `ChannelMask` that sums up how much the loss depends on each channel of one axis.

    Formula: as for `ChannelMask`. With x the weight before it is masked, every update adds

        score += (sum over the other axes of g * x)^2

    which is the squared change of the loss, to first order, that switching off the channel makes;
    g is the gradient of the whole batch, also where replicas share it.
    `score` is a trainable variable that optimizers overwrite with its "gradient", score plus that
    square: no learning rate, clipping or weight decay has part in it. Where losses are scaled
    (`LossScaleOptimizer`, float16), so is the sum. Over gradient accumulation steps, the largest
    square counts.

    Args:
        axes: as for `ChannelMask`.
        scored_axis: the one of `axes` whose channels have a score.
        calls: how often the weight is read per update: the number of calls of a shared layer. Each
            call adds its own square.
        **kwargs: as for a Keras layer.

    Reference: Molchanov et al., "Importance estimation for neural network pruning"
    (arXiv:1906.10771), equation 8.
    """

    def __init__(self, axes=(-1,), scored_axis=-1, calls=1, **kwargs):
        super().__init__(axes, **kwargs)
        if scored_axis not in self.axes:
            raise ValueError(
                f"Expected one of the axes {self.axes}. Received: scored_axis={scored_axis!r}"
            )
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise ValueError(f"Expected a positive whole number. Received: calls={calls!r}")
        self.scored_axis = scored_axis
        self.calls = calls

    def build(self, input_shape):
        super().build(input_shape)
        shape = (_size(input_shape, self.scored_axis),)
        self.score = self.add_weight(name="score", shape=shape, initializer="zeros")
        self.score.overwrite_with_gradient = True

    def state_axes(self, variable):
        return (self.scored_axis,) if variable is self.score else super().state_axes(variable)

    def call(self, inputs, training=None):
        # Also outside of training: a layer that is called with `training=False` may be trained.
        rank = len(inputs.shape)
        factor = self._factor(rank)
        others = [i for i in range(rank) if i - rank != self.scored_axis]

        @ops.custom_gradient
        def masked(x, score):
            def backward(*args, upstream=None):
                g = args[0] if upstream is None else upstream
                products = g * x
                # Without the condition, torch would sum over every axis of a vector.
                change = total(ops.sum(products, axis=others) if others else products)
                return g * factor, score / self.calls + ops.square(change)

            return x * factor, backward

        return masked(_read(inputs), _read(self.score))

    def get_config(self):
        return super().get_config() | {"scored_axis": self.scored_axis, "calls": self.calls}


def _checked_axes(axes):
    is_sequence = isinstance(axes, (tuple, list))
    if (
        not is_sequence
        or not axes
        or len(set(axes)) < len(axes)
        or any(isinstance(i, bool) or not isinstance(i, int) or i >= 0 for i in axes)
    ):
        raise ValueError(
            "Expected a tuple of distinct axes, counted from the end, such as (-1,). "
            f"Received: axes={axes!r}"
        )
    return tuple(axes)


def _read(variable):
    """Return a tensor: of TensorFlow's variables `custom_gradient` asks the gradient apart."""
    tensor = ops.convert_to_tensor(variable)
    return ops.reshape(tensor, ops.shape(tensor))


def _size(shape, axis):
    if axis < -len(shape) or shape[axis] is None:
        raise ValueError(
            "The masked axes must exist and have a known size. "
            f"Received: axis={axis}, input shape {tuple(shape)}"
        )
    return shape[axis]
