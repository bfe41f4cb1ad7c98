"""Quantizers: transforms that round a tensor to a uniform grid whose range is trained."""

import logging

import numpy as np
from keras import ops

from keras_compress.fake_quantize import (
    Asymmetric,
    RangeTraining,
    Symmetric,
    fake_quantize,
    nudged_range,
    observe,
)
from keras_compress.ranges import Grid
from keras_compress.transforms import Transform

SMALLEST_RANGE = 0.1  # floor of an initial scale or range at 8 bits; fewer have as small a step
SMALLEST_SHARE = 0.01  # the same, as a share of the largest among the channels
FLOAT_BITS = 32  # width of a weight in the IR that no whole number can hold

STEP_BYTES = 4  # a step is a float32

logger = logging.getLogger(__name__)


def stored_bytes(size, bits, steps):
    """Return the bytes of a weight in OpenVINO IR: of its numbers, and of its steps, if any.

    Args:
        size: how many numbers there are.
        bits: width of one: see `UniformQuantizer.stored_bits`.
        steps: how many steps there are, unless the numbers are floats.
    """
    return -(-size * bits // 8) + STEP_BYTES * (steps if bits < FLOAT_BITS else 0)


class Quantizer(Transform, abstract=True):
    """Base of all quantizers: transforms whose output takes few values, zero among them.

    Shapes: `x` any; variables of a range `()` per tensor, else the size of x on the kept axes and
    1 elsewhere: x `(3, 3, 16, 32)` with `axis=(-1,)` has variables `(1, 1, 1, 32)`.

    Without a range it lets x through in inference, and refuses to train. A staged quantizer has a
    boolean variable `enabled`, `()`, false at first; until it is true x passes through unchanged,
    with its gradient.

    Invariants: `q(0) == 0` and `q(q(x)) == q(x)`, exactly.

    A subclass defines `quantized`, `levels`, `effective_range`, `step` and `set_range`.

    Args:
        bits: width.
        axis: None, or tuple of negative ints: the axes that keep a range value per index.
        staged: whether it is switched on in the course of training.
        calibrated: whether the range has been set; a model file brings it along.
    """

    def __init__(self, bits, axis=None, staged=False, calibrated=False, **kwargs):
        super().__init__(**kwargs)
        self.bits = bits
        self.axis = _checked_axis(axis)
        self.staged = staged
        self.calibrated = calibrated
        self.observer = None
        self.observes_training_only = False

    @property
    def levels(self):
        """Number of grid values."""
        raise NotImplementedError(f"{type(self).__name__} must define `levels`.")

    @property
    def grid(self):
        """The `Grid` that estimators of the range may need to know."""
        return Grid(self.bits)

    @property
    def range_variables(self):
        """Variables of the range, a list: weight decay must not touch them."""
        return []

    @property
    def undecayed_variables(self):
        """The variables of the range, a list."""
        return list(self.range_variables)

    @property
    def is_on(self):
        """Whether it rounds: True but for a staged one that waits for its epoch."""
        return not self.staged or bool(ops.convert_to_numpy(self.enabled))

    def enable(self):
        """Let a staged quantizer round from now on."""
        if self.staged:
            self.enabled.assign(True)

    def build(self, input_shape):
        if self.staged:
            self.enabled = self.add_weight(
                name="enabled", shape=(), initializer="zeros", dtype="bool", trainable=False
            )

    def set_range(self, minimum, maximum):
        """Set the range from observed extremes and mark the quantizer as calibrated.

        Args:
            minimum: NumPy array that broadcasts to the shape of the variables.
            maximum: the same.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `set_range`.")

    def quantized(self, inputs, training):
        """Return the rounded tensor, with its gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `quantized`.")

    def call(self, inputs, training=None):
        if self.observer is not None:
            # Before the first step of training, Keras may call a model on made-up values.
            if training or not self.observes_training_only:
                observe(inputs, self.observer.update)
            # Depends on the range by a zero: optimizers warn of variables without a gradient.
            return inputs + 0.0 * sum(ops.convert_to_tensor(v) for v in self.range_variables)
        if not self.calibrated:
            if training:
                raise ValueError(
                    f"The range of quantizer '{self.path}' was never set. Pass `data=` to "
                    "`compress_model`, or train with the callback "
                    "`keras_compress.callbacks.Compress()`."
                )
            return inputs
        outputs = self.quantized(inputs, training)
        if not self.staged:
            return outputs
        return ops.where(ops.convert_to_tensor(self.enabled), outputs, inputs)

    def variable_shape(self, input_shape):
        """Shape of the range variables for an input shape."""
        if self.axis is None:
            return ()
        rank = len(input_shape)
        shape = [input_shape[i] if i - rank in self.axis else 1 for i in range(rank)]
        if min(self.axis) < -rank or None in shape:
            raise ValueError(
                f"The kept axes must exist and have a known size. Received: axis={self.axis}, "
                f"input shape {tuple(input_shape)}"
            )
        return tuple(shape)

    def get_config(self):
        return super().get_config() | {
            "bits": self.bits,
            "axis": self.axis,
            "staged": self.staged,
            "calibrated": self.calibrated,
        }


class UniformQuantizer(Quantizer, abstract=True):
    """Base of the quantizers with equal steps and a trained range.

    Formula, with `step = (high - low) / (levels - 1)`; low and high are whole multiples of it:

        y = step * round(clip(x, low, high) / step)

    Gradient: `dx = g` where `low <= x <= high`, else 0. That of the range has the rounding error
    inside the range and the clip indicator outside (see `fake_quantize`).

    Args:
        bits: width, 2 to 8.
        signed: whether the symmetric grid has negative levels. None: decided by `set_range`.
        narrow_range: leave out one level, so that a signed grid is symmetric.
        half_range: train an 8-bit quantizer on 7-bit levels, [-63, 63] if signed. Exported as an
            8-bit grid with the same step, products of two cannot overflow 16 bits on processors
            without VNNI.
        learnable: whether the range is trained.
        gradient_scale: None, or `"lsq"`: multiply the gradient of the range by
            `level_high^2 / sqrt(n * level_high)`, n being the number of elements that share a
            range value, in one sample where the first axis has no fixed size: see `RangeTraining`.
        range_gradient: `"rounding"`, or `"clipping"`: leave the rounding error out of the gradient
            of the range, which clipped values alone move then (PACT).
        lr_multiplier: factor on the gradient of the range.
        **kwargs: as for `Quantizer`.
    """

    def __init__(
        self,
        bits=8,
        axis=None,
        signed=None,
        narrow_range=False,
        half_range=False,
        learnable=True,
        gradient_scale=None,
        range_gradient="rounding",
        lr_multiplier=1.0,
        **kwargs,
    ):
        super().__init__(_checked_bits(bits, half_range), axis, **kwargs)
        if gradient_scale not in (None, "lsq"):
            raise ValueError(f"Expected None or 'lsq'. Received: gradient_scale={gradient_scale!r}")
        if range_gradient not in ("rounding", "clipping"):
            raise ValueError(
                f"Expected 'rounding' or 'clipping'. Received: range_gradient={range_gradient!r}"
            )
        self.signed = signed
        self.narrow_range = narrow_range
        self.half_range = half_range
        self.learnable = learnable
        self.gradient_scale = gradient_scale
        self.range_gradient = range_gradient
        self.lr_multiplier = lr_multiplier

    @property
    def levels(self):
        """Number of grid values."""
        return self.level_high - self.level_low + 1

    @property
    def codes(self):
        """(lowest, highest) whole multiple of the step that a grid value can be."""
        return self.level_low, self.level_high

    @property
    def stored_bits(self):
        """Width of the numbers that hold a weight of this grid in OpenVINO IR: 2, 4, 8 or 32.

        32 stands for the weight itself, in float32: codes past those of 8 bits would need an
        offset. Where a grid can lie anywhere around zero it is the largest that can be needed.

        Example:

        >>> [SymmetricQuantizer(bits, narrow_range=True).stored_bits for bits in (2, 3, 5, 8)]
        [2, 4, 8, 8]
        >>> [AsymmetricQuantizer(bits).stored_bits for bits in (2, 3, 4, 8)]
        [4, 4, 8, 32]
        """
        lowest, highest = self.codes
        if highest - lowest <= 3:
            return 2
        widths = (bits for bits in (4, 8) if -(2 ** (bits - 1)) <= lowest)
        return next((bits for bits in widths if highest < 2 ** (bits - 1)), FLOAT_BITS)

    @property
    def parametrization(self):
        """How `range_variables` give the range: see `fake_quantize`."""
        raise NotImplementedError(f"{type(self).__name__} must define `parametrization`.")

    def step(self):
        """Return the distance between two levels, a NumPy array shaped as the variables."""
        return self._range()[2]

    def effective_range(self):
        """Return the lowest and the highest grid value, (low, high), exactly as `call` has them."""
        return self._range()[:2]

    def build(self, input_shape):
        super().build(input_shape)
        self._batched = bool(input_shape) and input_shape[0] is None

    def _range(self):
        grid = nudged_range(self.range_variables, self.parametrization)
        return tuple(np.array(ops.convert_to_numpy(tensor)) for tensor in grid)

    def set_range(self, minimum, maximum):
        shape = tuple(self.range_variables[0].shape)
        minimum, maximum = (np.asarray(a, dtype="float32") for a in (minimum, maximum))
        if not (np.isfinite(minimum).all() and np.isfinite(maximum).all()):
            raise ValueError(f"Expected a finite range. Received: {minimum=}, {maximum=}")
        if (minimum > maximum).any():
            raise ValueError(f"Expected minimum <= maximum. Received: {minimum=}, {maximum=}")
        self._assign_range(np.broadcast_to(minimum, shape), np.broadcast_to(maximum, shape))
        self.calibrated = True

    def _assign_range(self, minimum, maximum):
        raise NotImplementedError(f"{type(self).__name__} must define `_assign_range`.")

    def quantized(self, inputs, training):
        return fake_quantize(
            inputs, self.range_variables, self.parametrization, self._range_training
        )

    @property
    def _range_training(self):
        return RangeTraining(
            self.learnable,
            self.lr_multiplier,
            lsq=self.gradient_scale == "lsq",
            batched=self._batched,
            rounding=self.range_gradient == "rounding",
        )

    def get_config(self):
        return super().get_config() | {
            "signed": self.signed,
            "narrow_range": self.narrow_range,
            "half_range": self.half_range,
            "learnable": self.learnable,
            "gradient_scale": self.gradient_scale,
            "range_gradient": self.range_gradient,
            "lr_multiplier": self.lr_multiplier,
        }

    def _add_range_variable(self, name, input_shape):
        return self.add_weight(
            name=name,
            shape=self.variable_shape(input_shape),
            initializer="ones",
            trainable=self.learnable,
        )


class SymmetricQuantizer(UniformQuantizer):
    """Quantizer with zero in the middle of its range (signed) or at its lower end (unsigned).

    Levels for b bits: signed `[-2^(b-1), 2^(b-1) - 1]`, unsigned `[0, 2^b - 1]`; a narrow range
    leaves out the lowest (signed) or the highest (unsigned). With `s = min(|scale| + eps, limit)`:

        step = s / level_high        low = step * level_low        high = s

        d scale = sum g * ((y - x) / (high - low) * inside + level_low / level_high * below + above)

    Args:
        limit: the largest magnitude that values can have (6 after a ReLU6), past which the range
            does not grow. None: there is no such bound.
        *args, **kwargs: as for `UniformQuantizer`.

    Example:

    >>> quantizer = SymmetricQuantizer(bits=2, narrow_range=True)
    >>> quantizer.build((3,))
    >>> quantizer.set_range(-1.0, 1.0)
    >>> quantizer(np.array([-3.0, 0.2, 0.6], "float32")).numpy()
    array([-1.,  0.,  1.], dtype=float32)

    Reference: Jain et al., "Trained quantization thresholds" (arXiv:1903.08066), section 3.
    """

    def __init__(self, *args, limit=None, **kwargs):
        super().__init__(*args, **kwargs)
        if limit is not None and not limit > 0:
            raise ValueError(f"Expected None or a positive limit. Received: limit={limit!r}")
        self.limit = limit

    @property
    def level_low(self):
        """Lowest whole code."""
        if self.signed is False:
            return 0
        left_out = self.narrow_range or self.half_range
        return left_out - 2 ** (self._trained_bits - 1)

    @property
    def level_high(self):
        """Highest whole code."""
        if self.signed is False:
            return 2**self._trained_bits - 1 - self.narrow_range
        return 2 ** (self._trained_bits - 1) - 1

    @property
    def _trained_bits(self):
        return self.bits - self.half_range

    @property
    def grid(self):
        narrow = self.narrow_range or self.half_range
        return Grid(self._trained_bits, True, self.signed, narrow)

    @property
    def range_variables(self):
        return [self.scale]

    @property
    def parametrization(self):
        return Symmetric(self.level_low, self.level_high, self.limit)

    def build(self, input_shape):
        super().build(input_shape)
        self.scale = self._add_range_variable("scale", input_shape)

    def _assign_range(self, minimum, maximum):
        both_signs = bool((minimum < 0).any())
        if self.signed is False and both_signs:
            logger.warning(
                "Quantizer '%s' was set to unsigned but saw negative values down to %g; it is "
                "signed now.",
                self.path,
                minimum.min(),
            )
        self.signed = both_signs or self.signed is True
        scale = np.maximum(np.abs(minimum), np.abs(maximum))
        self.scale.assign(_floored(scale, self.bits))

    def get_config(self):
        return super().get_config() | {"limit": self.limit}


class AsymmetricQuantizer(UniformQuantizer):
    """Quantizer with a free lower end and length; the range is widened until zero is on its grid.

    Levels `[0, 2^b - 1]`; a narrow range leaves out the highest. `signed` has no meaning here.
    With the trained `low` and `range`, `low, high = TuneRange(low, low + |range| + eps)`:

        d low   = sum g * (below + above)
        d range = sum g * ((y - x) / (high - low) * inside + above)

    Example:

    >>> quantizer = AsymmetricQuantizer(bits=2)
    >>> quantizer.build((4,))
    >>> quantizer.set_range(-1.0, 2.0)
    >>> quantizer(np.array([-3.0, 0.2, 0.6, 9.0], "float32")).numpy()
    array([-1.,  0.,  1.,  2.], dtype=float32)
    """

    level_low = 0

    @property
    def level_high(self):
        """Highest whole code."""
        return 2 ** (self.bits - self.half_range) - 1 - self.narrow_range

    @property
    def codes(self):
        """(lowest, highest) whole multiple of the step: zero may be at either end of the range."""
        return -self.level_high, self.level_high

    @property
    def grid(self):
        return Grid(self.bits - self.half_range, False, None, self.narrow_range)

    @property
    def range_variables(self):
        return [self.low, self.range]

    @property
    def parametrization(self):
        return Asymmetric(self.level_high)

    def build(self, input_shape):
        super().build(input_shape)
        self.low = self._add_range_variable("low", input_shape)
        self.range = self._add_range_variable("range", input_shape)

    def _assign_range(self, minimum, maximum):
        length = maximum - minimum
        floored = _floored(length, self.bits)
        self.low.assign(minimum - (floored - length) / 2)
        self.range.assign(floored)


def _floored(values, bits):
    floor = max(SMALLEST_SHARE * float(values.max()), SMALLEST_RANGE * 2**bits / 2**8)
    return np.maximum(values, np.float32(floor))


def _checked_bits(bits, half_range):
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"Expected a whole number of bits from 2 to 8. Received: bits={bits!r}")
    if half_range and bits != 8:
        raise ValueError(f"`half_range` is for 8 bits only. Received: bits={bits}")
    return bits


def _checked_axis(axis):
    if axis is None:
        return None
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axis or not all(isinstance(i, int) and i < 0 for i in axis):
        raise ValueError(
            f"Expected None or axes counted from the end, such as (-1,). Received: axis={axis}"
        )
    return axis
