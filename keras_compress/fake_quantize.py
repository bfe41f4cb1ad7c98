"""Arithmetic of fake quantization: the rounded tensor and its exact gradients, on each backend.

A *grid* has `levels` values `step * code` with whole codes, zero among them:

    step = (high - low) / (levels - 1)          zero_point = round(-low / step)
    low, high <- -zero_point * step, (levels - 1 - zero_point) * step
    y = step * (floor((clip(x, low, high) - low) / step + 1/2) - zero_point)

This is the arithmetic of TensorFlow's `fake_quant_with_min_max_vars`, ties included, so that a
model trained on any backend lands on the numbers that the exported operation gives.

For an incoming gradient g, with `inside`, `below` and `above` telling where x lies:

    dx      = g * inside
    d low   = sum g * (below + above)
    d range = sum g * ((y - x) / range * inside + level_low / level_high * below + above)

Each sum runs over the elements that share one range value. A *parametrization* (`Symmetric`,
`Asymmetric`) says how trained parameters give low and high, and how three sums give their
gradients:

    rounding = sum g * (y - clip(x))        below = sum g * below        above = sum g * above

One function per backend joins the two: `fake_quantize(x, parameters, parametrization)`.
"""

import functools
import math
from typing import NamedTuple

import keras
from keras import ops

from keras_compress.replicas import observed_by_worker

EPSILON = 1e-16  # keeps a trained scale or range of exactly zero from dividing by zero


class RangeTraining(NamedTuple):
    """How the parameters of a range are trained.

    Attributes:
        learnable: False leaves out their gradient.
        multiplier: factor on their gradient.
        lsq: whether to multiply it also by `level_high^2 / sqrt(n * level_high)`. Gradient descent
            on the range, `level_high` steps long, then moves the step as it does with a gradient
            of the step times `1 / sqrt(n * level_high)` (Esser et al., arXiv:1902.08153, section
            2.2).
        batched: whether the first axis of the tensor counts samples. Then n is the number of
            elements of one sample that share a range value, else of the whole tensor.
        rounding: False leaves the rounding error inside the range out: only clipped values move
            the range (PACT, Choi et al., arXiv:1805.06085, section 3).
    """

    learnable: bool = True
    multiplier: float = 1.0
    lsq: bool = False
    batched: bool = False
    rounding: bool = True

    def gradients(self, parametrization, parameters, x, rounding, below, above):
        """Return the gradients of the parameters of a range, from the three sums.

        LSQ's gradient has the rounding error in steps, so over the highest value; without it the
        error counts over the length of the range, which is twice that where there are signs.
        """
        if self.lsq:
            rounding = rounding * ((parametrization.levels - 1) / parametrization.level_high)
        gradients = parametrization.gradients(parameters, rounding, below, above)
        return self._scaled(gradients, parametrization, x)

    def _scaled(self, gradients, parametrization, x):
        if not self.lsq:
            if self.multiplier == 1.0:
                return gradients
            factor = self.multiplier
        else:
            counted = x[0] if self.batched else x
            elements = ops.cast(ops.size(counted), "float32") / ops.cast(
                ops.size(gradients[0]), "float32"
            )
            level = float(parametrization.level_high)
            factor = self.multiplier * level**1.5 * ops.rsqrt(elements)
        return tuple(gradient * factor for gradient in gradients)


class Symmetric(NamedTuple):
    """Range around zero with one trained parameter, `scale`, the value of the highest level.

    Formulas, with `s = min(|scale| + eps, limit)`:

        low = s * level_low / level_high          high = s

    The gradient of the scale is `d range` of the module's formulas, with `range = s - low`; it
    passes straight through the minimum. `limit` is a bound of the tensor (6 after a ReLU6, None:
    no bound), so nothing lies above a range that has reached it.
    """

    level_low: int
    level_high: int
    limit: float | None = None

    @property
    def levels(self):
        return self.level_high - self.level_low + 1

    @property
    def ratio(self):
        return self.level_low / self.level_high

    def bounds(self, scale):
        """Return (low, high)."""
        high = ops.abs(scale) + EPSILON
        if self.limit is not None:
            high = ops.minimum(high, self.limit)
        return high * self.ratio, high

    def gradients(self, parameters, rounding, below, above):
        """Return the gradient of each parameter, from the three sums."""
        (scale,) = parameters
        low, high = self.bounds(scale)
        if self.limit is not None:
            above = ops.where(high < self.limit, above, 0.0)
        gradient = rounding / (high - low) + above
        if self.level_low:
            gradient = gradient + self.ratio * below
        return (gradient * _sign(scale),)


class Asymmetric(NamedTuple):
    """Range with two trained parameters, its lower end `low` and its length `range`.

    The range is first widened to hold zero, then to have zero on its grid: of the two ranges that
    move one end only, the wider (`TuneRange`). Gradients pass straight through both steps.
    """

    level_high: int

    @property
    def levels(self):
        return self.level_high + 1

    def bounds(self, low, range):
        """Return (low, high) with zero on the grid."""
        n = float(self.level_high)
        high = ops.maximum(low + ops.abs(range) + EPSILON, 0.0)
        low = ops.minimum(low, 0.0)
        zero_point = ops.round(-low * n / (high - low))
        is_first, is_last = zero_point <= 0.0, zero_point >= n
        # The divisors are made safe first: the branch not taken must not be a NaN either.
        below = ops.where(is_last, -1.0, zero_point - n)
        above = ops.where(is_first, 1.0, zero_point)
        other_low = ops.where(is_last, low, zero_point / below * high)
        other_high = ops.where(is_first, high, (zero_point - n) / above * low)
        low_moves = high - other_low > other_high - low
        return ops.where(low_moves, other_low, low), ops.where(low_moves, high, other_high)

    def gradients(self, parameters, rounding, below, above):
        """Return the gradient of each parameter, from the three sums."""
        low, high = self.bounds(*parameters)
        return below + above, (rounding / (high - low) + above) * _sign(parameters[1])


def _sign(x):
    """Sign of a tensor, with +1 at zero: a parameter must be able to leave zero."""
    return ops.where(x < 0, -1.0, 1.0)


TRAINED = RangeTraining()


def fake_quantize(x, parameters, parametrization, training=TRAINED):
    """Round a float32 tensor to its grid, with the gradients of the module's docstring.

    Args:
        x: float32 tensor.
        parameters: tuple of float32 tensors, all of shape `()` or of one shape that broadcasts
            with x: the size of x on the axes kept, 1 elsewhere.
        parametrization: `Symmetric` or `Asymmetric`.
        training: `RangeTraining`.

    Returns:
        Tensor shaped as x.
    """
    implementation = _IMPLEMENTATIONS[keras.backend.backend()]()
    parameters = tuple(map(ops.convert_to_tensor, parameters))
    return implementation(ops.convert_to_tensor(x), parameters, parametrization, training)


def nudged_range(parameters, parametrization):
    """Return (low, high, step) of the grid exactly as `fake_quantize` uses it, as tensors."""
    parameters = map(ops.convert_to_tensor, parameters)
    low, high, step, _ = _grid(*parametrization.bounds(*parameters), parametrization.levels)
    return low, high, step


def _grid(low, high, levels):
    step = (high - low) / (levels - 1)
    zero_point = ops.floor(-low / step + 0.5)
    return -zero_point * step, (levels - 1 - zero_point) * step, step, zero_point


def _round(x, low, high, step, zero_point):
    codes = ops.floor((ops.clip(x, low, high) - low) * (1.0 / step) - zero_point + 0.5)
    return codes * step


def _backward(g, x, parameters, parametrization, training):
    """Gradients from whole-array operations, which JAX fuses."""
    grid = _grid(*parametrization.bounds(*parameters), parametrization.levels)
    low, high = grid[:2]
    is_below, is_above = x < low, x > high
    dx = ops.where(ops.logical_or(is_below, is_above), 0.0, g)
    if not training.learnable:
        return dx, None
    kept_shape = tuple(parameters[0].shape)
    axes = [i for i, size in enumerate(kept_shape) if size == 1] if kept_shape else None

    def total(values):
        return ops.reshape(ops.sum(values, axis=axes, keepdims=True), kept_shape)

    below, above = (total(ops.where(where, g, 0.0)) for where in (is_below, is_above))
    rounding = total(dx * (_round(x, *grid) - x)) if training.rounding else 0.0
    return dx, training.gradients(parametrization, parameters, x, rounding, below, above)


def _forward(x, parameters, parametrization):
    return _round(x, *_grid(*parametrization.bounds(*parameters), parametrization.levels))


@functools.cache
def _jax():
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def quantize(x, parameters, parametrization, training):
        return _forward(x, parameters, parametrization)

    def forward(x, parameters, parametrization, training):
        return quantize(x, parameters, parametrization, training), (x, parameters)

    def backward(parametrization, training, saved, g):
        x, parameters = saved
        dx, gradients = _backward(g, x, parameters, parametrization, training)
        return dx, gradients or tuple(map(jax.numpy.zeros_like, parameters))

    quantize.defvjp(forward, backward)
    return quantize


@functools.cache
def _torch():
    import torch

    class Quantize(torch.autograd.Function):
        """Keeps errors and what lies outside, not x or y, which others may write into."""

        @staticmethod
        def forward(ctx, x, parametrization, training, *parameters):
            low, high, step, zero_point = _grid(
                *parametrization.bounds(*parameters), parametrization.levels
            )
            # As `_round`, in the memory of the first result.
            y = torch.maximum(x, low)
            torch.minimum(y, high, out=y)
            y.sub_(low).mul_(1.0 / step).sub_(zero_point).add_(0.5).floor_().mul_(step)
            if any(ctx.needs_input_grad):
                error = y - x if training.learnable and training.rounding else None
                ctx.save_for_backward(x < low, x > high, error, *parameters)
                ctx.static = parametrization, training
            return y

        @staticmethod
        def backward(ctx, g):
            is_below, is_above, error, *parameters = ctx.saved_tensors
            parametrization, training = ctx.static
            dx = g * ~(is_below | is_above)
            if not training.learnable:
                return dx, None, None, *[None] * len(parameters)
            shape = parameters[0].shape

            def total(values, factors):
                if not shape and factors.dtype == values.dtype:
                    return torch.dot(values.reshape(-1), factors.reshape(-1))
                return (values * factors).sum_to_size(shape)

            reads_below = getattr(parametrization, "level_low", None) != 0
            rounding = 0.0 if error is None else total(dx, error)
            below = total(g, is_below) if reads_below else 0.0
            sums = rounding, below, total(g, is_above)
            return dx, None, None, *training.gradients(parametrization, parameters, g, *sums)

    def quantize(x, parameters, parametrization, training):
        return Quantize.apply(x, parametrization, training, *parameters)

    return quantize


@functools.cache
def _tensorflow():
    import tensorflow as tf

    def quantize(x, parameters, parametrization, training):
        x = _before_relu(x, parametrization)

        @tf.custom_gradient
        def apply(x, *parameters):
            low, high = parametrization.bounds(*parameters)
            grid = _TensorFlowGrid(tf, x, low, high, parametrization.levels)
            y = grid.forward(x)

            def backward(g):
                dx, *sums = grid.backward(g, x, y, training)
                if not sums:
                    return dx, *(None for _ in parameters)
                return dx, *training.gradients(parametrization, parameters, x, *sums)

            return y, backward

        # Read variables here: inside, `custom_gradient` would ask for their gradient apart.
        return apply(*map(tf.convert_to_tensor, (x, *parameters)))

    return quantize


def _before_relu(x, parametrization):
    """Return the tensor that a ReLU made x from, where rounding clips as the ReLU does, else x.

    It is for graphs: what nothing reads is not computed. The gradient differs where the tensor
    before the ReLU is exactly zero: TensorFlow's ReLU stops it there, the grid's end does not.
    """
    made_by = getattr(x, "op", None)  # None: computed at once, outside of a graph
    unsigned = isinstance(parametrization, Symmetric) and parametrization.level_low == 0
    if made_by is None or not unsigned or made_by.type not in ("Relu", "Relu6"):
        return x
    cap = 6.0 if made_by.type == "Relu6" else math.inf
    limit = math.inf if parametrization.limit is None else parametrization.limit
    return made_by.inputs[0] if limit <= cap else x


class _TensorFlowGrid:
    """TensorFlow's own operations, the ones that converters know: one pass over the tensor each.

    Args:
        tf: the module.
        x: tensor to be rounded.
        low, high: range, of shape `()` or with the size of x on the kept axes and 1 elsewhere.
        levels: number of levels.
    """

    def __init__(self, tf, x, low, high, levels):
        bits = levels.bit_length() - (levels & (levels - 1) == 0)
        self.tf = tf
        self.options = {"num_bits": bits, "narrow_range": levels < 2**bits}
        self.range_shape = tuple(low.shape)
        kept = [i for i, size in enumerate(self.range_shape) if size != 1]
        self.per_channel = bool(kept)
        self.low, self.high = (tf.reshape(t, (-1,) if kept else ()) for t in (low, high))
        rest = [i for i in range(len(x.shape)) if i not in kept]
        self.order = rest + kept
        self.moves = self.per_channel and self.order != sorted(self.order)

    def forward(self, x):
        """Return x rounded."""
        quantization = self.tf.quantization
        if not self.per_channel:
            return quantization.fake_quant_with_min_max_vars(x, self.low, self.high, **self.options)
        y = quantization.fake_quant_with_min_max_vars_per_channel(
            self._channels_last(x), self.low, self.high, **self.options
        )
        return self._restored(y, x)

    def backward(self, g, x, y, training):
        """Return `dx` and, where the range is trained, the sums (rounding, below, above) for it."""
        tf = self.tf
        if not self.per_channel:
            dx, below, above = tf.quantization.fake_quant_with_min_max_vars_gradient(
                g, x, self.low, self.high, **self.options
            )
            if not training.learnable:
                return (dx,)
            if not training.rounding:
                return dx, 0.0, *(tf.reshape(t, self.range_shape) for t in (below, above))
            with tf.control_dependencies([dx]):  # the last reader of x: its memory can be reused
                error = y - x
            # A matrix product of one row and one column: products are summed without being stored.
            rows = (tf.reshape(t, (1, -1)) for t in (dx, error))
            sums = tf.linalg.matmul(*rows, transpose_b=True), below, above
            return dx, *(tf.reshape(t, self.range_shape) for t in sums)
        flat = self._channels_last(x)
        dx, below, above = tf.quantization.fake_quant_with_min_max_vars_per_channel_gradient(
            self._channels_last(g), flat, self.low, self.high, **self.options
        )
        restored = self._restored(dx, x)
        if not training.learnable:
            return (restored,)
        rounding = tf.zeros_like(below)
        if training.rounding:
            rounding = tf.reduce_sum(dx * (self._channels_last(y) - flat), axis=0)
        return restored, *(tf.reshape(t, self.range_shape) for t in (rounding, below, above))

    def _channels_last(self, x):
        """Bring the kept axes to the end, as one; the others become one too."""
        moved = self.tf.transpose(x, self.order) if self.moves else x
        return self.tf.reshape(moved, (-1, self.low.shape[0]))

    def _restored(self, flat, x):
        """Undo `_channels_last`."""
        tf = self.tf
        shape = tf.shape(x)
        if self.moves:
            y = tf.reshape(flat, tf.gather(shape, self.order))
            y = tf.transpose(y, [self.order.index(i) for i in range(len(self.order))])
        else:
            y = tf.reshape(flat, shape)
        return tf.ensure_shape(y, x.shape)


def observe(x, update):
    """Hand a tensor to a Python function as a NumPy array, whenever the computation runs.

    Where several processes train together, that of each is handed the samples of all.
    """
    backend = keras.backend.backend()
    x = observed_by_worker(x)
    if x is None:
        return
    if backend == "jax":
        import jax

        jax.debug.callback(update, x)
    elif backend == "tensorflow" and not hasattr(x, "numpy"):
        import tensorflow as tf

        tf.numpy_function(update, [x], [], stateful=True)
    else:
        update(ops.convert_to_numpy(x))


_IMPLEMENTATIONS = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
