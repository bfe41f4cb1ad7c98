"""Range estimators: from the values that a tensor takes to the range of its quantizer.

Pure NumPy. An estimator sees batches (axis 0 = samples) and keeps a bounded summary of them.
"""

from typing import NamedTuple

import numpy as np

SAMPLED_VALUES = 2**20  # values that an estimator of quantiles keeps, however many it has seen
MAD_TO_SIGMA = 1.4826  # standard deviation / median absolute deviation of a normal distribution

LEAST_SHARE = 0.02  # of the largest magnitude that the search for the least error goes down to
CANDIDATES = 99  # ranges that it tries
JUDGED_VALUES = 2**17  # that it judges them by, at random, where there are more
JUDGED_ROWS = 2**10  # of each channel at least

ESTIMATORS = {}  # name -> class, filled by subclassing


class Grid(NamedTuple):
    """The codes of a quantizer, as far as the estimation of its range has to know them.

    Attributes:
        bits: width that is trained.
        symmetric: whether zero is the code 0; else the range lies freely.
        signed: whether a symmetric grid has negative codes; None: where there are negative values.
        narrow: whether one code is left out: the lowest, or the highest where none is negative.
    """

    bits: int = 8
    symmetric: bool = True
    signed: bool | None = True
    narrow: bool = False

    def codes(self, lowest):
        """Return (lowest, highest) code for data whose lowest value is given."""
        if self.symmetric and (self.signed or lowest < 0):
            half = 2 ** (self.bits - 1)
            return self.narrow - half, half - 1
        return 0, 2**self.bits - 1 - self.narrow


class Estimator:
    """Base of the estimators: `update(values)` any number of times, then `result()`.

    Shapes: `values` is `(samples, elements, channels)`; `channels` is 1 when one range serves the
    whole tensor. `result()` gives (minimum, maximum), each of shape `(channels,)`.

    Args:
        min_percentile, max_percentile: percentiles in [0, 100]; used by two of the estimators.
        grid: the `Grid` of the quantizer; used by one.
    """

    def __init_subclass__(cls, name=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            ESTIMATORS[name] = cls

    def __init__(self, min_percentile, max_percentile, grid):
        self.percentiles = min_percentile, max_percentile
        self.grid = grid


class MinMax(Estimator, name="min_max"):
    """Smallest and largest of all values."""

    low = np.inf
    high = -np.inf

    def update(self, values):
        self.low = np.minimum(self.low, values.min(axis=(0, 1)))
        self.high = np.maximum(self.high, values.max(axis=(0, 1)))

    def result(self):
        return self.low, self.high


class SampleMean(Estimator):
    """Mean over the samples of a pair of numbers of each; a subclass says which pair."""

    count = 0
    low = 0.0
    high = 0.0

    def update(self, values):
        low, high = self.of_each(values)
        self.count += len(values)
        self.low = self.low + low.sum(axis=0, dtype="float64")
        self.high = self.high + high.sum(axis=0, dtype="float64")

    def result(self):
        return self.low / self.count, self.high / self.count


class MeanMinMax(SampleMean, name="mean_min_max"):
    """Mean over the samples of each one's smallest and largest value."""

    def of_each(self, values):
        return values.min(axis=1), values.max(axis=1)


class MeanPercentile(SampleMean, name="mean_percentile"):
    """Mean over the samples of each one's lower and upper percentile."""

    def of_each(self, values):
        return np.percentile(values, self.percentiles, axis=1)


class MixedMinMax(Estimator, name="mixed_min_max"):
    """`mean_min_max` where one range serves the tensor, `min_max` where each channel has its own.

    A mean over the samples softens single outliers of a whole tensor; a channel alone sees too
    few values for it.
    """

    estimator = None

    def update(self, values):
        if self.estimator is None:
            kind = MeanMinMax if values.shape[-1] == 1 else MinMax
            self.estimator = kind(*self.percentiles, self.grid)
        self.estimator.update(values)

    def result(self):
        return self.estimator.result()


class Sampled(Estimator):
    """Base of the estimators that look at quantiles of all values, from a bounded random sample.

    Every value has had the same chance of being kept; all are, while they fit.
    """

    chance = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.random = np.random.default_rng(0)
        self.rows = None

    def update(self, values):
        rows = values.reshape(-1, values.shape[-1])
        if self.chance < 1:
            rows = rows[self.random.random(len(rows)) < self.chance]
        self.rows = rows.copy() if self.rows is None else np.concatenate([self.rows, rows])
        while self.rows.size > SAMPLED_VALUES and len(self.rows) > 1:
            self.rows = self.rows[self.random.random(len(self.rows)) < 0.5]
            self.chance /= 2


class Percentile(Sampled, name="percentile"):
    """Lower and upper percentile of all values."""

    def result(self):
        return tuple(np.percentile(self.rows, self.percentiles, axis=0))


class ThreeSigma(Sampled, name="threesigma"):
    """Median plus and minus three robust standard deviations (1.4826 times the MAD)."""

    def result(self):
        median = np.median(self.rows, axis=0)
        sigma = MAD_TO_SIGMA * np.median(np.abs(self.rows - median), axis=0)
        return median - 3 * sigma, median + 3 * sigma


class LeastSquares(Sampled, name="mse"):
    """The range whose grid leaves the least squared error: for few bits, where outliers cost most.

    Of the range from the smallest to the largest value, shrunk to 2 %, 3 %, ... 100 %, the best:

        error(r) = mean((x - step * clip(round(x / step) , codes))^2)
    """

    def result(self):
        low, high = self.rows.min(axis=0), self.rows.max(axis=0)
        first, last = self.grid.codes(low.min())
        if self.grid.symmetric:
            high = np.maximum(np.abs(low), np.abs(high))
            low = high * first / last
        else:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        ratios = np.linspace(LEAST_SHARE, 1, CANDIDATES)
        rows = self._judged()
        errors = [_error(rows, low * ratio, high * ratio, last - first) for ratio in ratios]
        best = ratios[np.argmin(errors, axis=0)]
        # Of a symmetric grid, the highest code's value says it all: a signed one starts below.
        signed = self.grid.symmetric and first < 0
        return (-high if signed else low) * best, high * best

    def _judged(self):
        count = max(JUDGED_VALUES // self.rows.shape[1], JUDGED_ROWS)
        if len(self.rows) <= count:
            return self.rows
        return self.rows[self.random.choice(len(self.rows), count, replace=False)]


def _error(values, low, high, intervals):
    """Return the mean squared error of every channel on a grid from low to high."""
    step = np.where(high > low, (high - low) / intervals, 1.0).astype("float32")
    zero = np.rint(low / step)
    codes = np.clip(np.rint(values / step), zero, zero + intervals)
    return np.square(codes * step - values).mean(axis=0, dtype="float64")


class Observer:
    """Watches a tensor and estimates the range that its quantizer should have.

    Args:
        kind: `"mixed_min_max"`, `"min_max"`, `"mean_min_max"`, `"threesigma"`, `"percentile"` or
            `"mean_percentile"` or `"mse"`.
        axis: None, or the tuple of negative axes that keep a range of their own.
        min_percentile, max_percentile: percentiles in [0, 100].
        grid: the `Grid` of the quantizer, which `"mse"` fits. None: 8 bits around zero.
        name: what is watched, for messages.

    Attributes:
        samples: how many samples it has seen.

    Example:

    >>> observer = Observer("min_max")
    >>> observer.update(np.array([[1.0, 2.0], [-3.0, 0.0]]))
    >>> observer.result()
    (array(-3., dtype=float32), array(2., dtype=float32))
    """

    def __init__(
        self,
        kind="mixed_min_max",
        axis=None,
        min_percentile=0.1,
        max_percentile=99.9,
        grid=None,
        name=None,
    ):
        if kind not in ESTIMATORS:
            raise ValueError(f"Expected one of {sorted(ESTIMATORS)}. Received: kind={kind!r}")
        if not 0 <= min_percentile < max_percentile <= 100:
            raise ValueError(
                "Expected 0 <= min_percentile < max_percentile <= 100. Received: "
                f"min_percentile={min_percentile}, max_percentile={max_percentile}"
            )
        self.axis = axis
        self.name = name
        self.estimator = ESTIMATORS[kind](min_percentile, max_percentile, grid or Grid())
        self.samples = 0
        self._shape = None

    def update(self, batch):
        """Take in a batch: an array whose axis 0 counts samples."""
        batch = np.asarray(batch)
        if not np.isfinite(batch).all():
            place = f" at '{self.name}'" if self.name else ""
            raise ValueError(
                f"Expected finite values. Received NaN or infinity in a tensor of shape "
                f"{batch.shape}{place}: check the data, the weights and the float model's output."
            )
        if batch.size == 0:
            return
        self.samples += len(batch)
        kept = () if self.axis is None else self.axis
        rank = batch.ndim
        self._shape = tuple(batch.shape[i] if i - rank in kept else 1 for i in range(rank))
        self.estimator.update(self._three_axes(batch.astype("float32"), kept))

    def _three_axes(self, batch, kept):
        """Bring a batch to (samples, elements, channels)."""
        rank = batch.ndim
        if -rank in kept:
            raise ValueError(
                f"Axis 0 counts the samples and keeps no range. Received: axis={self.axis} for a "
                f"batch of shape {batch.shape}"
            )
        order = [0, *(i for i in range(1, rank) if i - rank not in kept)]
        channels = [i for i in range(rank) if i - rank in kept]
        size = int(np.prod([batch.shape[i] for i in channels]))
        return batch.transpose(order + channels).reshape(len(batch), -1, size)

    def result(self):
        """Return (minimum, maximum), float32 arrays of shape `()` or broadcastable to a batch."""
        if self._shape is None:
            raise ValueError("The observer has seen no data: call `update` before `result`.")
        shape = () if self.axis is None else self._shape
        low, high = self.estimator.result()
        return tuple(np.asarray(a, "float32").reshape(shape) for a in (low, high))
