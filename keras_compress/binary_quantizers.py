"""Quantizers of one bit, and of three values: binarization and ternary weights.

Weights become their sign times a scale that is computed from them at every call; nothing is
trained but the weights. Activations become zero or a trained scale.
"""

import numpy as np
from keras import ops

from keras_compress.quantizers import Quantizer
from keras_compress.ranges import Grid

TERNARY_SHARE = 0.7  # of the mean magnitude, below which a ternary weight is zero
SMALLEST_SCALE = 1e-3  # floor of the initial scale of activations
HIGHEST_SHARE = 1 - 2.0**-22  # of the scale that a threshold reaches: it stays below the scale


class Binarizer(Quantizer, abstract=True):
    """Base of the quantizers whose output has one magnitude beside zero.

    Args:
        bits: width, fixed by the subclass.
        **kwargs: as for `Quantizer`.
    """

    @property
    def grid(self):
        """The `Grid` from zero to one step."""
        return Grid(bits=1, symmetric=False)

    def get_config(self):
        config = super().get_config()
        del config["bits"]
        return config


class SignWeights(Binarizer, abstract=True):
    """Base of the quantizers of weights: their sign, or zero, times a scale computed from them.

    It has no variables and needs no calibration: `set_range` changes nothing. The gradient passes
    straight through, also where a weight becomes zero, and none goes through the scale:

        dw = g

    A subclass defines `chosen`.
    """

    def __init__(self, bits, axis=None, **kwargs):
        super().__init__(bits, axis, **kwargs | {"calibrated": True})

    def chosen(self, magnitudes, axes):
        """Return which weights do not become zero, a boolean tensor.

        Args:
            magnitudes: tensor of |w|.
            axes: list of the axes whose weights share a scale.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `chosen`.")

    def set_range(self, minimum, maximum):
        """Do nothing: the scale follows the weights."""

    def quantized(self, inputs, training):
        rounded = ops.stop_gradient(self._rounded(inputs))
        # The difference is zero, exactly, and has the gradient of the identity.
        return rounded + (inputs - ops.stop_gradient(inputs))

    def _rounded(self, weight):
        rank = len(weight.shape)
        axes = [i for i in range(rank) if i - rank not in (self.axis or ())]
        magnitudes = ops.abs(weight)
        chosen = self.chosen(magnitudes, axes)
        scale = _mean(magnitudes, chosen, axes)
        return ops.where(chosen, ops.sign(weight) * scale, 0.0)

    def get_config(self):
        config = super().get_config()
        del config["calibrated"]
        return config


class BinaryWeights(SignWeights):
    """Weights of one magnitude: their sign times the mean magnitude of those that share a scale.

    Shapes: w any; the scale has the size of w on the kept axes and 1 elsewhere.

    Formula; weights that are zero, as behind a mask, stay zero and do not count:

        y = s * sign(w)        sign(0) = 0        s = sum |w| / count(w != 0)

    Gradient: `dw = g`. Of all zeros, s = 0.

    Invariants: `q(0) == 0` and `q(q(w)) == q(w)`, exactly.

    Args:
        axis: tuple of negative ints: a scale per index, as XNOR-Net has one per filter. None: one
            for all, as in DoReFa-Net.
        **kwargs: as for `Quantizer`.

    Example:

    >>> BinaryWeights()(np.array([-3.0, 0.0, 1.0], "float32")).numpy()
    array([-2.,  0.,  2.], dtype=float32)

    Reference: Rastegari et al., "XNOR-Net" (arXiv:1603.05279), section 3.1; Zhou et al.,
    "DoReFa-Net" (arXiv:1606.06160), equation 7.
    """

    levels = 2  # zero is where a mask has put it

    def __init__(self, axis=None, **kwargs):
        super().__init__(1, axis, **kwargs)

    def chosen(self, magnitudes, axes):
        return magnitudes > 0


class TernaryWeights(SignWeights):
    """Weights of one magnitude, or zero where they are small.

    Shapes: w any; threshold and scale have the size of w on the kept axes and 1 elsewhere.

    Formula; both means leave out weights that are zero, so that a mask does not lower the
    threshold:

        d = 0.7 * mean(|w| over w != 0)        s = mean(|w| over |w| > d)
        y = s * sign(w) where |w| > d, else 0

    Gradient: `dw = g`. Of all zeros, s = 0.

    Invariants: `q(0) == 0` and `q(q(w)) == q(w)`, exactly.

    Args:
        axis: tuple of negative ints: a threshold and a scale per index. None: one for all.
        **kwargs: as for `Quantizer`.

    Example:

    >>> TernaryWeights()(np.array([-3.0, 0.5, 1.0, 1.5], "float32")).numpy()
    array([-2.25,  0.  ,  0.  ,  2.25], dtype=float32)

    Reference: Li et al., "Ternary weight networks" (arXiv:1605.04711), equations 5 and 6.
    """

    levels = 3

    def __init__(self, axis=None, **kwargs):
        super().__init__(2, axis, **kwargs)

    def chosen(self, magnitudes, axes):
        return magnitudes > TERNARY_SHARE * _mean(magnitudes, magnitudes > 0, axes)


def _mean(values, counted, axes):
    """Mean of the counted values over axes, which stay with size 1; 0 where none counts.

    It is held between the smallest and the largest of them: the mean of equal values is that value,
    whatever rounding the sum has met with.
    """
    largest = ops.max(ops.where(counted, values, 0.0), axis=axes, keepdims=True)
    smallest = ops.min(ops.where(counted, values, float("inf")), axis=axes, keepdims=True)
    total = ops.sum(ops.where(counted, values, 0.0), axis=axes, keepdims=True)
    count = ops.sum(ops.cast(counted, values.dtype), axis=axes, keepdims=True)
    return ops.minimum(ops.maximum(total / ops.maximum(count, 1.0), smallest), largest)


class BinaryActivations(Binarizer):
    """Activations of one bit: zero or the scale, as they lie below or above a threshold.

    Shapes: x any; `log_scale` and `threshold` are `()`.

    Formula, with `s = exp(log_scale)` and the threshold's share of it `p = sigmoid(threshold)`:

        y = s where x > s * p, else 0

    Gradient, with `below = x <= s`; it takes y for the identity between 0 and s:

        dx          = g * below where x >= 0, else 0
        d log_scale = s * sum g * (below * (y - x) / s + (1 - below))
        d threshold = -p * (1 - p) * sum g * (0 < x < s)

    Invariants: `q(0) == 0` and `q(q(x)) == q(x)`, exactly.

    `set_range` makes the observed maximum the scale; which of the values counts as that is up to
    the observer. The threshold starts in the middle, at p = 1/2.

    Args:
        lr_multiplier: factor on the gradients of `log_scale` and `threshold`.
        **kwargs: as for `Quantizer`, without `axis`.

    Example:

    >>> quantizer = BinaryActivations()
    >>> quantizer.build((4,))
    >>> quantizer.set_range(0.0, 2.0)
    >>> quantizer(np.array([-1.0, 1.0, 1.1, 3.0], "float32")).numpy()
    array([0., 0., 2., 2.], dtype=float32)
    """

    levels = 2

    def __init__(self, lr_multiplier=1.0, **kwargs):
        super().__init__(1, None, **kwargs)
        self.lr_multiplier = lr_multiplier

    @property
    def range_variables(self):
        return [self.log_scale, self.threshold]

    def build(self, input_shape):
        super().build(input_shape)
        self.log_scale = self.add_weight(name="log_scale", shape=(), initializer="zeros")
        self.threshold = self.add_weight(name="threshold", shape=(), initializer="zeros")

    def set_range(self, minimum, maximum):
        scale = np.asarray(maximum, "float32")
        if not np.isfinite(scale).all():
            raise ValueError(f"Expected a finite range. Received: {minimum=}, {maximum=}")
        scale = np.maximum(scale.reshape(()), np.float32(SMALLEST_SCALE))
        self.log_scale.assign(np.log(scale))
        self.calibrated = True

    def step(self):
        """Return the scale, a NumPy array `()`."""
        return self._values()[0]

    def effective_range(self):
        """Return (0, scale), NumPy arrays `()`."""
        scale = self.step()
        return np.zeros_like(scale), scale

    def cutoff(self):
        """Return the value above which x becomes the scale, a NumPy array `()`."""
        scale, share = self._values()
        return scale * share

    def _values(self):
        return [np.array(ops.convert_to_numpy(tensor)) for tensor in self._scale_and_share()]

    def quantized(self, inputs, training):
        return binarize(inputs, *self._scale_and_share(), self.lr_multiplier)

    def _scale_and_share(self):
        share = ops.minimum(ops.sigmoid(self.threshold), HIGHEST_SHARE)
        return ops.exp(self.log_scale), share

    def get_config(self):
        config = super().get_config() | {"lr_multiplier": self.lr_multiplier}
        del config["axis"]
        return config


def binarize(x, scale, share, multiplier=1.0):
    """Return zero or the scale, with the gradients of `BinaryActivations`.

    Formula, for an incoming g and `below = x <= scale`:

        y       = scale where x > scale * share, else 0
        dx      = g * below where x >= 0, else 0
        d scale = sum g * (below * (y - x) / scale + (1 - below))
        d share = -sum g * (0 < x < scale)

    Args:
        x: float32 tensor.
        scale: float32 tensor `()`, positive.
        share: float32 tensor `()`: that of the scale which x has to exceed, in (0, 1).
        multiplier: factor on the gradients of `scale` and `share`.
    """

    @ops.custom_gradient
    def apply(x, scale, share):
        y = ops.where(x > scale * share, scale, 0.0)

        def gradients(*args, upstream=None):  # torch hands the arguments back, too
            g = args[0] if upstream is None else upstream
            below = x <= scale
            dx = ops.where(ops.logical_and(below, x >= 0), g, 0.0)
            d_scale = ops.sum(g * ops.where(below, (y - x) / scale, 1.0))
            inside = ops.logical_and(x > 0, x < scale)
            d_share = -ops.sum(ops.where(inside, g, 0.0))
            return dx, multiplier * d_scale, multiplier * d_share

        return y, gradients

    return apply(*map(ops.convert_to_tensor, (x, scale, share)))
