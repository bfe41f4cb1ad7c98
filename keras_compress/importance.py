"""Importance: one score per filter, and which channels stay by their scores.

Pure NumPy, in float64. The least important filters are pruned first. A *channel* is one index of
an axis that several weights may share; a *group* is a set of channels that are ranked together.
"""

import math
import numbers

import numpy as np

ROWS_AT_ONCE = 1024  # filters whose distances to all others are held at a time


def l1(weight, axis):
    """L1 norm of each filter: the sum of `|w|`.

    Args:
        weight: array, any shape.
        axis: negative int, the axis that counts the filters.

    Returns:
        Array `(weight.shape[axis],)`.

    Example:

    >>> l1(np.array([[3.0, 0.0], [-4.0, 1.0]]), axis=-1)
    array([7., 1.])
    """
    return np.abs(_filters(weight, axis)).sum(axis=1)


def l2(weight, axis):
    """L2 norm of each filter: the root of the sum of `w**2`.

    Args:
        weight: array, any shape.
        axis: negative int, the axis that counts the filters.

    Returns:
        Array `(weight.shape[axis],)`.

    Example:

    >>> l2(np.array([[3.0, 0.0], [-4.0, 1.0]]), axis=-1)
    array([5., 1.])
    """
    return np.linalg.norm(_filters(weight, axis), axis=1)


def geometric_median(weight, axis):
    """Sum of each filter's distances to all others; a small one can be replaced by them.

    Formula, over filters F flattened:

        score_i = sum_j ||F_i - F_j||_2

    Args:
        weight: array, any shape.
        axis: negative int, the axis that counts the filters.

    Returns:
        Array `(weight.shape[axis],)`.

    Example:

    >>> geometric_median(np.array([[0.0, 3.0, 3.0], [0.0, 4.0, 4.0]]), axis=-1)
    array([10.,  5.,  5.])

    Reference: He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration, arXiv:1811.00250, equation 6.
    """
    filters = _filters(weight, axis)
    # Distances do not depend on the origin; near it the expansion of the square loses least.
    filters = filters - filters.mean(axis=0)
    squares = np.square(filters).sum(axis=1)
    scores = np.zeros(len(filters))
    for start in range(0, len(filters), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        squared = squares[rows, None] - 2 * filters[rows] @ filters.T + squares
        distances = np.sqrt(np.maximum(squared, 0))
        own = np.arange(len(distances))
        distances[own, start + own] = 0
        scores[rows] = distances.sum(axis=1)
    return scores


IMPORTANCE = {"L1": l1, "L2": l2, "geometric_median": geometric_median}  # configuration name -> it


def batch_norm_scale(gamma):
    """Magnitude of the scale of a batch normalization, `|gamma|`, as the score of its channels."""
    return np.abs(np.asarray(gamma, "float64"))


def random_scores(count, seed):
    """Scores drawn uniformly from (0, 1); the same ones for the same seed."""
    check_whole("count", count)
    tiny = np.finfo("float64").tiny
    return np.random.default_rng(seed).uniform(tiny, 1.0, count)


def normalized(weight):
    """Weight divided by its L2 norm, which makes layers comparable; zeros stay zeros.

    Example:

    >>> normalized(np.array([3.0, 4.0]))
    array([0.6, 0.8])
    """
    weight = np.asarray(weight, "float64")
    norm = np.linalg.norm(weight)
    return weight / norm if norm > 0 else weight.copy()


def channel_scores(scores, channels, count):
    """Sum of the scores of the positions that belong to the same channel.

    Args:
        scores: `(positions,)`.
        channels: `(positions,)`, whole numbers in [0, count): the channel of each position.
        count: number of channels.

    Returns:
        Array `(count,)`; 0 where a channel has no position.

    Example:

    >>> channel_scores([1.0, 2.0, 4.0], np.array([0, 2, 0]), count=3)
    array([5., 0., 2.])
    """
    check_whole("count", count)
    scores, channels = np.asarray(scores, "float64"), np.asarray(channels)
    if scores.ndim != 1 or scores.shape != channels.shape:
        raise ValueError(
            "Expected one channel for each score, both of rank 1. Received: "
            f"scores.shape={scores.shape}, channels.shape={channels.shape}"
        )
    if not np.issubdtype(channels.dtype, np.integer):
        raise ValueError(f"Expected whole numbers. Received: channels.dtype={channels.dtype}")
    if channels.size and not 0 <= channels.min() <= channels.max() < count:
        raise ValueError(
            f"Expected channels in [0, {count}). Received: channels from {channels.min()} to "
            f"{channels.max()}, count={count}"
        )
    sums = np.bincount(channels, weights=scores, minlength=count)
    return sums.astype("float64")  # without any position they are whole numbers


def kept_count(total, level, round_to, shift=0.0):
    """Number of channels that stay at a pruning level, a multiple of `round_to`.

    Formula; the result is never above `total`, and never below the smaller of it and `round_to`:

        kept = ceil((total - total * level) / round_to - shift) * round_to

    Args:
        total: number of channels, at least 1.
        level: fraction to prune, in [0, 1).
        round_to: whole number, at least 1. Where it is `total` or more, all channels stay.
        shift: in [0, 1): how much of a multiple is rounded down, not up. Groups with different
            shifts take their steps at different levels.

    Example:

    >>> [kept_count(64, level, round_to=8) for level in (0.0, 0.1, 0.3, 0.5, 0.99)]
    [64, 64, 48, 32, 8]
    """
    check_whole("total", total, 1)
    _check_fraction("level", level)
    _check_fraction("shift", shift)
    shift = shift if level else 0.0
    return _rounded_up(total - _product(total, level) - shift * round_to, round_to, total)


def keep_highest(scores, count):
    """Boolean array with the `count` highest scores True; of equal ones the first stay.

    Args:
        scores: `(channels,)`, finite.
        count: whole number in [0, channels].

    Example:

    >>> keep_highest([1.0, 3.0, 1.0, 2.0], count=3)
    array([ True,  True, False,  True])
    """
    scores = _checked_scores(scores)
    check_whole("count", count)
    if count > len(scores):
        raise ValueError(f"Expected a count of at most {len(scores)}. Received: count={count}")
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def global_keep(scores, level, round_to, quota=0.9):
    """Boolean arrays, one per group, of the channels that stay after one ranking over all groups.

    The `floor(level * all channels)` lowest scores are candidates to go; of equal ones those of
    later groups, and later in the group, go first. A group gives up its candidates in ascending
    order, but no more than `floor(quota * its channels)`, no more than leave a multiple of
    `round_to`, and never all. Candidates that come back are not replaced by other groups', so less
    than `level` may go.

    Args:
        scores: list of arrays `(channels,)`, one per group, finite and comparable.
        level: fraction to prune of all channels, in [0, 1).
        round_to: whole number, at least 1. A group of `round_to` channels or fewer stays whole.
        quota: largest fraction of a group that may go, in [0, 1].

    Example:

    >>> global_keep([[1.0, 5.0], [4.0, 2.0, 3.0]], level=0.4, round_to=1)
    [array([False,  True]), array([ True, False,  True])]
    """
    scores = [_checked_scores(group) for group in scores]
    _check_fraction("level", level)
    _check_fraction("quota", quota, closed=True)
    ranking = np.concatenate([np.zeros(0), *scores])
    stay = keep_highest(ranking, len(ranking) - math.floor(_product(len(ranking), level)))
    kept, start = [], 0
    for group in scores:
        size = len(group)
        candidates = size - int(stay[start : start + size].sum())
        removed = min(candidates, math.floor(_product(size, quota)))
        kept.append(keep_highest(group, _rounded_up(size - removed, round_to, size)))
        start += size
    return kept


def _filters(weight, axis):
    """Bring a weight to (filters, elements)."""
    weight = np.asarray(weight, "float64")
    if not isinstance(axis, numbers.Integral) or not -weight.ndim <= axis < 0:
        raise ValueError(
            f"Expected an axis in [-{weight.ndim}, -1] for a weight of shape {weight.shape}. "
            f"Received: axis={axis!r}"
        )
    count = weight.shape[axis]
    return np.moveaxis(weight, axis, 0).reshape(count, weight.size // max(count, 1))


def _product(count, fraction):
    """Multiply without the noise that lets 100 * 0.29 fall below 29."""
    return round(count * fraction, 9)


def _rounded_up(count, round_to, total):
    """Round a count up to a multiple, at least one multiple and at most `total`."""
    check_whole("round_to", round_to, 1)
    return min(max(math.ceil(count / round_to), 1) * round_to, total)


def _checked_scores(scores):
    scores = np.asarray(scores, "float64")
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(
            f"Expected finite scores of rank 1. Received: scores.shape={scores.shape}, "
            f"{np.count_nonzero(~np.isfinite(scores))} of them NaN or infinite"
        )
    return scores


def check_whole(name, value, smallest=0):
    """Raise a ValueError unless a named value is a whole number of at least `smallest`."""
    if not isinstance(value, numbers.Integral) or value < smallest:
        raise ValueError(
            f"Expected a whole number of at least {smallest}. Received: {name}={value!r}"
        )


def _check_fraction(name, value, closed=False):
    if not (0 <= value < 1 or (closed and value == 1)):
        interval = "[0, 1]" if closed else "[0, 1)"
        raise ValueError(f"Expected a fraction in {interval}. Received: {name}={value!r}")
