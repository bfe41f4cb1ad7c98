"""Sparsity: which weights stay, by their scores.

Pure NumPy. Scores are compared in float32, whatever their dtype. Every function gives boolean
masks of the shape of the weights, in which True stays; of equal scores the first stay. A *level*
is the fraction that goes, in [0, 1).
"""

import numbers
from decimal import Decimal

import numpy as np

from keras_compress.importance import check_whole

PIECE = 1 << 18  # scores that are worked on at a time, so that none of the copies is a whole one
KINDS = ("abs", "normed_abs")
MODES = ("fine", "block", "per_dim")


def importances(weight, kind):
    """Scores of the single weights.

    Formula, with the norm over the whole tensor:

        abs         score = |w|
        normed_abs  score = |w| / ||w||_2        zeros where the norm is 0

    Args:
        weight: array, any shape, finite in float32.
        kind: "abs", or "normed_abs", which makes tensors comparable.

    Returns:
        float32 array of the shape of `weight`.

    Example:

    >>> importances(np.array([3.0, -4.0]), "normed_abs")
    array([0.6, 0.8], dtype=float32)
    """
    _check_choice("kind", kind, KINDS)
    weight = np.asarray(weight)
    scores = np.empty(weight.shape, "float32")
    flat = scores.reshape(-1)
    for piece, values in _pieces(weight, kind):
        flat[piece] = values
    return scores


def removed_count(total, level):
    """Number of entries that go at a level: `floor(total * level)`, in decimal arithmetic.

    The level counts as the decimal number that it is written as, to 12 digits behind the point, so
    that 0.29 of 100 is 29 although the float product is less.

    Invariants, the level being rounded to those digits: `0 <= total * level - removed < 1`; unless
    it is then 1, at least one entry stays.

    Args:
        total: whole number of at least 0.
        level: fraction that goes, in [0, 1).

    Example:

    >>> [removed_count(total, 0.29) for total in (3, 4, 100)]
    [0, 1, 29]
    """
    check_whole("total", total, 0)
    if not 0 <= level < 1:
        raise ValueError(f"Expected a level in [0, 1). Received: level={level!r}")
    return int(total * Decimal(repr(round(float(level), 12))))


def smallest(scores, level, kind=None):
    """Masks without the smallest scores of all arrays together.

    The `removed_count(all entries, level)` smallest go, exactly as many. Of equal scores those of
    later arrays, and later in the array (in C order), go first. What goes at a level also goes at
    every higher one. For a level of its own in each array, call it for one array at a time.

    Time grows linearly with the number of scores. Memory on top of the arrays: 4 bytes per score
    while the threshold is sought, then 1 for the mask.

    Args:
        scores: list of arrays, any shapes, finite in float32.
        level: fraction that goes, in [0, 1).
        kind: None, or one of `importances`: then the arrays are weights, and their scores are
            found on the way, without ever being held.

    Returns:
        List of boolean arrays, one per array, of its shape.

    Example:

    >>> smallest([np.array([1.0, 5.0]), np.array([[4.0, 1.0, 3.0]])], level=0.2)
    [array([ True,  True]), array([[ True, False,  True]])]
    >>> smallest([np.array([1.0, -5.0]), np.array([[-4.0, 1.0, 3.0]])], level=0.6, kind="abs")
    [array([False,  True]), array([[ True, False, False]])]
    """
    if kind is not None:
        _check_choice("kind", kind, KINDS)
    arrays = [np.asarray(array) for array in scores]
    removed = removed_count(sum(array.size for array in arrays), level)
    if removed == 0:
        return [np.ones(array.shape, bool) for array in arrays]
    threshold, ties = _threshold(arrays, kind, removed)
    masks = []
    for array in arrays:
        mask = np.empty(array.shape, bool)
        flat = mask.reshape(-1)
        for piece, values in _pieces(array, kind):
            np.greater(values, threshold, out=flat[piece])
            if ties:
                equal = np.flatnonzero(values == threshold)[:ties]
                flat[piece][equal] = True
                ties -= len(equal)
        masks.append(mask)
    return masks


def n_of_m(weight, n, m, axis):
    """Mask in which, of every m consecutive entries along an axis, the n largest magnitudes stay.

    Runs start at index 0 of the axis. A last run of only r < m entries keeps min(n, r) of them, as
    if it were filled up with zeros; that is what TFMOT and NVIDIA's ASP do. Of equal magnitudes
    those of lower index stay. At every other index, such as each position of a convolution
    kernel, runs are separate. Time grows with m.

    Args:
        weight: array, any shape, finite. Keras' kernels have their input axis at -2.
        n: whole number in [1, m].
        m: whole number of at least 1.
        axis: negative int, the axis that is summed over where the weight is used.

    Returns:
        Boolean array of the shape of `weight`.

    Example:

    >>> kernel = np.array([[1.0, -4.0, 2.0, 3.0, 5.0, 6.0]]).T
    >>> n_of_m(kernel, n=2, m=4, axis=-2).T
    array([[False,  True, False,  True,  True,  True]])

    Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378. TFMOT's
    `sparsity_m_by_n` counts the zeros instead: its (2, 4) is n=2, m=4, its (1, 4) is n=3, m=4.
    """
    weight = np.asarray(weight)
    _check_axes("axis", (axis,), weight.shape)
    check_whole("m", m, 1)
    check_whole("n", n, 1)
    if n > m:
        raise ValueError(f"Expected n of at most m. Received: n={n}, m={m}")
    if not np.isfinite(weight).all():
        raise ValueError(_not_finite(weight))
    entries = np.moveaxis(weight, axis, 0)
    rank = np.zeros(entries.shape, np.min_scalar_type(m))  # how many of the run come before
    for i in range(min(m, len(entries))):
        earlier = np.abs(entries[i::m])
        for j in range(i + 1, min(m, len(entries))):
            later = np.abs(entries[j::m])  # the last run may have an i but no j
            wins = earlier[: len(later)] >= later
            rank[j::m] += wins
            rank[i::m][: len(later)] += ~wins
    mask = np.empty(weight.shape, bool)
    np.less(rank, n, out=np.moveaxis(mask, axis, 0))
    return mask


def blocks(scores, block_shape, level, axes=None):
    """Mask in which whole blocks go: those of the smallest mean score.

    The `removed_count(number of blocks, level)` blocks of the smallest mean go, exactly as many;
    of equal ones the last. Where the blocks do not divide the array, those at its end are smaller.
    They count like the others, so the fraction of entries that go may then differ from `level`.

    For one ranking over several arrays, rank their means:

        means = [block_means(array, block_shape) for array in scores]
        masks = [spread(stays, array.shape, block_shape) for stays, array
                 in zip(smallest(means, level), scores)]

    Args:
        scores: array, any shape, finite.
        block_shape: whole numbers of at least 1, the size of a block along each of `axes`.
        level: fraction of the blocks that goes, in [0, 1).
        axes: distinct negative ints; the last ones where not given. At every index of the other
            axes blocks are separate.

    Returns:
        Boolean array of the shape of `scores`.

    Example:

    >>> blocks(np.array([[1.0, 2.0, 9.0], [3.0, 0.0, 1.0]]), block_shape=(2, 2), level=0.5)
    array([[False, False,  True],
           [False, False,  True]])
    """
    (stays,) = smallest([block_means(scores, block_shape, axes)], level)
    return spread(stays, np.shape(scores), block_shape, axes)


def block_means(scores, block_shape, axes=None):
    """Mean of the scores in each block.

    Args:
        scores: array, any shape.
        block_shape: as for `blocks`.
        axes: as for `blocks`.

    Returns:
        float32 array; along each of `axes` it is as long as there are blocks, the last of which
        may be smaller.

    Example:

    >>> block_means(np.array([[1.0, 2.0, 9.0], [3.0, 0.0, 1.0]]), block_shape=(2, 2))
    array([[1.5, 5. ]], dtype=float32)
    """
    means = np.asarray(scores)
    for axis, sizes in _layout(means.shape, block_shape, axes):
        entries = np.moveaxis(means, axis, 0)
        period = max(sizes, default=1)
        sums = entries[::period].astype("float64")
        for i in range(1, period):
            others = entries[i::period]  # the last block may have no i
            sums[: len(others)] += others
        sums /= sizes.reshape([-1] + [1] * (sums.ndim - 1))
        means = np.moveaxis(sums, 0, axis)
    return np.asarray(means, "float32", order="C")


def spread(values, shape, block_shape, axes=None):
    """Repeat a value of each block over the entries of the block.

    Args:
        values: array as `block_means` returns it, any dtype.
        shape: shape of the weight.
        block_shape: as for `blocks`.
        axes: as for `blocks`.

    Returns:
        Array of shape `shape`.

    Example:

    >>> spread(np.array([[1.5, 5.0]]), (2, 3), block_shape=(2, 2))
    array([[1.5, 1.5, 5. ],
           [1.5, 1.5, 5. ]])
    """
    values = np.asarray(values)
    layout = _layout(shape, block_shape, axes)
    expected = list(shape)
    for axis, sizes in layout:
        expected[axis] = len(sizes)
    if values.shape != tuple(expected):
        raise ValueError(
            f"Expected one value per block, shape {tuple(expected)}. "
            f"Received: values of shape {values.shape}"
        )
    for axis, sizes in layout:
        values = np.repeat(values, sizes, axis=axis)
    return values


def pooled(scores, mode, sparse_factors=None, axis=None):
    """Mean score of the structure that each weight belongs to, at the place of the weight.

    | mode | structure |
    |---|---|
    | fine | each weight for itself |
    | block | rectangles of `sparse_factors` along the last axes |
    | per_dim | all weights of one index of `axis` |

    Args:
        scores: array, any shape.
        mode: "fine", "block" or "per_dim".
        sparse_factors: for block, and only then: as the block shape of `blocks`, in the order of
            the axes of `scores`.
        axis: for per_dim, and only then: negative int.

    Returns:
        float32 array of the shape of `scores`.

    Example:

    >>> scores = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> pooled(scores, "per_dim", axis=-1)
    array([[2., 3.],
           [2., 3.]], dtype=float32)
    >>> pooled(scores, "block", sparse_factors=(1, 2))
    array([[1.5, 1.5],
           [3.5, 3.5]], dtype=float32)
    """
    _check_choice("mode", mode, MODES)
    _check_given(mode, "block", "sparse_factors", sparse_factors)
    _check_given(mode, "per_dim", "axis", axis)
    scores = np.asarray(scores)
    if mode == "fine":
        return scores.astype("float32")
    block = sparse_factors
    if mode == "per_dim":
        _check_axes("axis", (axis,), scores.shape)
        block = [max(size, 1) for size in scores.shape]
        block[axis] = 1
    return spread(block_means(scores, block), scores.shape, block)


def level_of(masks):
    """Fraction of zeros, or False, in a list of masks; 0 where they have no entries.

    Example:

    >>> level_of([np.array([True, False]), np.array([[1.0, 0.0, 1.0]])])
    0.4
    """
    masks = [np.asarray(mask) for mask in masks]
    zeros = sum(mask.size - int(np.count_nonzero(mask)) for mask in masks)
    return zeros / max(sum(mask.size for mask in masks), 1)


def _threshold(arrays, kind, removed):
    """Return the largest score that goes, and how many equal to it stay all the same."""
    lowest = 0.0 if kind is not None else _lowest(arrays)
    buffer = np.empty(sum(array.size for array in arrays), "float32")
    count = 0  # of scores above the lowest; partition is slow where most are the same
    for array in arrays:
        for _, values in _pieces(array, kind):
            higher = values[values > lowest]
            buffer[count : count + len(higher)] = higher
            count += len(higher)
    rank = removed - (len(buffer) - count)
    if rank <= 0:
        return lowest, -rank
    scores = buffer[:count]
    scores.partition(rank - 1)
    threshold, ties = scores[rank - 1], 0
    for start in range(rank, count, PIECE):
        ties += np.count_nonzero(scores[start : start + PIECE] == threshold)
    return threshold, ties


def _lowest(arrays):
    with np.errstate(over="ignore"):
        return min(np.float32(array.min()) for array in arrays if array.size)


def _pieces(array, kind):
    """Yield slices of an array, flat in C order, each with its scores in float32.

    The next scores overwrite the last. A whole copy is made only of an array that is not
    contiguous.
    """
    flat = array.reshape(-1)
    norm = _norm(flat) if kind == "normed_abs" else 0.0
    scratch = np.empty(min(PIECE, flat.size), "float32")
    for start in range(0, flat.size, PIECE):
        piece = slice(start, min(start + PIECE, flat.size))
        values = scratch[: piece.stop - start]
        with np.errstate(over="ignore"):
            values[:] = flat[piece]
        if not np.isfinite(values).all():
            raise ValueError(_not_finite(array))
        if kind is not None:
            np.abs(values, out=values)
        if norm > 0:
            np.divide(values, np.float64(norm), out=values, casting="same_kind")
        yield piece, values


def _norm(flat):
    """L2 norm, in float64 but without a copy in it."""
    squares = 0.0
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE].astype("float64")
        with np.errstate(over="ignore"):  # what is not finite in float32 is found elsewhere
            squares += np.square(piece, out=piece).sum()
    return np.sqrt(squares)


def _layout(shape, block_shape, axes):
    """Return (axis, how long each of its blocks is) of every axis that has blocks."""
    block_shape = tuple(block_shape)
    for size in block_shape:
        check_whole("size of a block", size, 1)
    axes = tuple(range(-len(block_shape), 0)) if axes is None else tuple(axes)
    if len(axes) != len(block_shape) or len(set(axes)) < len(axes):
        raise ValueError(
            "Expected distinct axes, as many as a block has sizes. Received: "
            f"block_shape={block_shape}, axes={axes}"
        )
    _check_axes("axes", axes, shape)
    return [
        (axis, np.diff(np.append(np.arange(0, shape[axis], size), shape[axis])))
        for axis, size in zip(axes, block_shape, strict=True)
    ]


def _check_axes(name, axes, shape):
    for axis in axes:
        if not isinstance(axis, numbers.Integral) or not -len(shape) <= axis < 0:
            raise ValueError(
                f"Expected an axis counted from the end, in [-{len(shape)}, -1], of an array of "
                f"shape {tuple(shape)}. Received: {name}={axis!r}"
            )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"Expected one of {', '.join(choices)}. Received: {name}={value!r}")


def _check_given(mode, where, name, value):
    if (value is not None) != (mode == where):
        raise ValueError(
            f"Expected {name} for mode='{where}', and for no other. "
            f"Received: mode={mode!r}, {name}={value!r}"
        )


def _not_finite(array):
    with np.errstate(over="ignore"):
        count = np.count_nonzero(~np.isfinite(array.astype("float32")))
    return (
        f"Expected finite numbers. Received: an array of shape {array.shape}, {count} of them NaN "
        "or infinite in float32"
    )
