"""From a quantized float weight back to its integers: the grid is found in the values alone.

A weight that was rounded to a grid of at most 255 levels per output channel is `codes * step`
exactly (up to the rounding of that one product). The largest such step per channel is found by
trying every code for the channel's largest value. Nothing beside the weight is needed, so stripped
models and models of other makers are served alike.
"""

from typing import NamedTuple

import numpy as np

LARGEST_CODE = 255  # of an asymmetric 8-bit grid that ends at zero
TOLERANCE = 6e-7  # relative; five roundings of float32, what folding a batch norm may add


class IntegerWeight(NamedTuple):
    """A weight as integers: `weight == (codes + offset) * step`.

    Attributes:
        codes: int8 array, shaped as the weight.
        step: float32 array that broadcasts with the weight: its size on the kept axes, else 1.
        offset: int16 array shaped as `step`; all zero for symmetric grids.
    """

    codes: np.ndarray
    step: np.ndarray
    offset: np.ndarray

    @property
    def storage(self):
        """Name of the narrowest storage type: `u1` (for -1 and 1 only), `u2`, `i4` or `i8`."""
        if self.offset.any():
            return "i8"
        if (np.abs(self.codes) == 1).all():
            return "u1"
        low, high = int(self.codes.min()), int(self.codes.max())
        if high - low <= 3:
            return "u2"
        return "i4" if low >= -8 and high <= 7 else "i8"


def integer_weight(weight, kept_axes):
    """Return the `IntegerWeight` that equals a float weight, or None where it is on no grid.

    Args:
        weight: float array, e.g. `(out, in, height, width)`.
        kept_axes: axes that have a step per index, e.g. `(0,)`.
    """
    weight = np.asarray(weight, dtype="float32")
    kept = [axis % weight.ndim for axis in kept_axes]
    rest = [axis for axis in range(weight.ndim) if axis not in kept]
    channels = np.transpose(weight, kept + rest).reshape(
        int(np.prod([weight.shape[axis] for axis in kept])), -1
    )
    if not weight.size or not np.isfinite(weight).all():
        return None
    found = []
    for values in channels:
        found.append(_largest_step(np.unique(values).astype("float64")))
        if found[-1] is None:
            return None
    shape = [size if axis in kept else 1 for axis, size in enumerate(weight.shape)]
    order = np.argsort(np.argsort(kept))  # the kept axes may be listed in any order
    step, low, high = (
        np.transpose(np.reshape(part, [weight.shape[a] for a in kept]), order).reshape(shape)
        for part in zip(*found, strict=True)
    )
    fits = max(-low.min(), high.max()) <= 127
    offset = np.zeros(shape, "int16") if fits else (low + 128).astype("int16")
    codes = np.rint(weight / step) - offset
    return IntegerWeight(codes.astype("int8"), step.astype("float32"), offset)


def _largest_step(values):
    """Return (step, lowest code, highest code) for sorted distinct values, or None."""
    if len(values) > LARGEST_CODE + 1:
        return None
    largest = np.abs(values).max()
    if largest == 0:
        return 1.0, 0, 0
    steps = largest / np.arange(1, LARGEST_CODE + 1)
    codes = np.rint(values / steps[:, None])
    error = np.abs(codes * steps[:, None] - values)
    exact = (error <= TOLERANCE * np.abs(values)).all(axis=1)
    exact &= codes[:, -1] - codes[:, 0] <= LARGEST_CODE
    if not exact.any():
        return None
    codes = codes[np.argmax(exact)]  # the first: the coarsest grid
    return (values @ codes) / (codes @ codes), int(codes[0]), int(codes[-1])
