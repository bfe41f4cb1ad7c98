"""Selection of weights against loops over exact numbers, and the exactness of levels."""

import doctest
import itertools
import math
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_compress import sparsity
from keras_compress.sparsity import (
    KINDS,
    block_means,
    blocks,
    importances,
    level_of,
    n_of_m,
    pooled,
    removed_count,
    smallest,
    spread,
)

property_test = settings(deadline=None, derandomize=True, max_examples=300)
percentages = st.integers(0, 99)  # of which exact fractions are known
shapes = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)
tied = st.integers(-3, 3).map(lambda i: i / 4)  # few numbers: many ties
random = np.random.default_rng(0)


@st.composite
def arrays(draw, shape=shapes):
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    count = math.prod(shape)
    return np.array(draw(st.lists(tied, min_size=count, max_size=count)), "float32").reshape(shape)


def bits(mask):
    return "".join(str(int(stays)) for stays in np.ravel(mask))


def naive_smallest(scores, removed):
    """Rank (score, last first) and take the first ones away."""
    entries = [(s, a, i) for a, array in enumerate(scores) for i, s in enumerate(np.ravel(array))]
    entries.sort(key=lambda entry: (entry[0], -entry[1], -entry[2]))
    masks = [np.ones(array.size, bool) for array in scores]
    for _, a, i in entries[:removed]:
        masks[a][i] = False
    return [mask.reshape(array.shape) for mask, array in zip(masks, scores, strict=True)]


def test_examples_in_the_docstrings():
    names = {name: getattr(sparsity, name) for name in dir(sparsity)}
    result = doctest.testmod(sparsity, extraglobs=names)
    assert result.failed == 0 and result.attempted == 13


def test_importances_by_hand():
    weight = np.array([[2.0, -1.0], [0.0, -2.0]])
    np.testing.assert_array_equal(importances(weight, "abs"), [[2, 1], [0, 2]])
    scores = importances(weight, "normed_abs")
    np.testing.assert_array_equal(scores, (np.array([[2, 1], [0, 2]]) / 3).astype("float32"))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(importances(np.zeros((2, 3)), "normed_abs"), np.zeros((2, 3)))
    assert importances(np.zeros((0, 3)), "normed_abs").shape == (0, 3)
    assert importances(np.float32(-3), "abs") == 3


@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_the_norm_neither_overflows_nor_loses_digits(scale):
    weight = (random.normal(size=(3, 100_001)) * scale).astype("float32")  # more than one piece
    exact = np.abs(weight.astype("float64")) / np.linalg.norm(weight.astype("float64"))
    np.testing.assert_allclose(importances(weight, "normed_abs"), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_every_dtype_is_scored_in_float32(dtype):
    weight = random.normal(size=(4, 5)).astype(dtype)
    np.testing.assert_array_equal(importances(weight, "abs"), np.abs(weight.astype("float32")))
    assert level_of(smallest([weight], 0.5, "abs")) == 0.5
    assert level_of([n_of_m(weight, 1, 2, -2)]) == 0.5
    assert pooled(weight, "block", (2, 5)).dtype == np.float32


def test_weights_are_left_alone():
    weight = -np.ones((2, 2), "float32")
    importances(weight, "normed_abs")
    smallest([weight], 0.5, "abs")
    n_of_m(weight, 1, 2, -1)
    pooled(weight, "fine")[:] = 1
    assert (weight == -1).all()


@pytest.mark.parametrize(
    "total, level, removed",
    [
        (10, 0, 0),
        (10, 0.3, 3),
        (10, 0.35, 3),
        (10, 0.39, 3),
        (3, 0.5, 1),
        (1, 0.999, 0),
        (0, 0.5, 0),
        (100, 0.29, 29),  # 28.999999999999996 in floats
        (100, 0.57, 57),  # 56.99999999999999
        (1000, 0.001, 1),
        (10, 0.1 + 0.2, 3),
        (10, 1 - 0.9 * 1 / 3, 7),
        (10, 0.7999999999999999, 8),  # the noise of a schedule
        (100_000_000, 0.29, 29_000_000),
        (10**12, 1e-5, 10**7),
        (4, np.float32(0.5), 2),
    ],
)
def test_removed_count_by_hand(total, level, removed):
    assert removed_count(total, level) == removed


@property_test
@given(total=st.integers(0, 10**9), thousandths=st.integers(0, 999))
def test_removed_count_in_exact_arithmetic(total, thousandths):
    removed = removed_count(total, thousandths / 1000)
    assert removed == math.floor(total * Fraction(thousandths, 1000)) and type(removed) is int
    assert removed < total or total == 0


@property_test
@given(total=st.integers(0, 10**6), pair=st.tuples(*[st.floats(0, 0.999)] * 2).map(sorted))
def test_removed_count_rises_with_the_level(total, pair):
    low, high = (removed_count(total, level) for level in pair)
    assert low <= high and abs(high - total * pair[1]) < 1 + 1e-5


def test_smallest_by_hand():
    scores = [np.array([[1.0, 4.0], [2.0, 8.0]]), np.array([2.0, -5.0, 2.0, 9.0, 1.0, 7.0])]
    found = {tenths: [bits(m) for m in smallest(scores, tenths / 10)] for tenths in range(10)}
    assert found == {
        0: ["1111", "111111"],
        1: ["1111", "101111"],
        2: ["1111", "101101"],  # of two ones, the later
        3: ["0111", "101101"],
        4: ["0111", "100101"],  # of three twos, the last
        5: ["0111", "000101"],
        6: ["0101", "000101"],
        7: ["0001", "000101"],
        8: ["0001", "000100"],
        9: ["0000", "000100"],
    }


@property_test
@given(scores=st.lists(arrays(), max_size=4), percent=percentages)
def test_smallest_is_the_head_of_the_ranking(scores, percent):
    total = sum(array.size for array in scores)
    masks = smallest(scores, percent / 100)
    for mask, expected in zip(masks, naive_smallest(scores, total * percent // 100), strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert mask.dtype == bool


@property_test
@given(
    scores=st.lists(arrays(), min_size=1, max_size=4),
    pair=st.tuples(percentages, percentages).map(sorted),
)
def test_what_goes_at_a_level_goes_at_a_higher_one(scores, pair):
    fewer, more = (smallest(scores, percent / 100) for percent in pair)
    assert all((high <= low).all() for low, high in zip(fewer, more, strict=True))


@property_test
@given(
    weights=st.lists(arrays(), min_size=1, max_size=4),
    percent=percentages,
    kind=st.sampled_from(KINDS),
)
def test_a_kind_is_the_selection_by_its_importances(weights, percent, kind):
    scores = [importances(weight, kind) for weight in weights]
    direct, apart = smallest(weights, percent / 100, kind), smallest(scores, percent / 100)
    for one, other in zip(direct, apart, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sizes", [[1], [7], [1, 1, 1], [1000, 1, 999], [300_001, 5, 262_144]])
@pytest.mark.parametrize("values", ["distinct", "equal", "two", "half_zero"])
def test_levels_are_exact_within_one_weight(sizes, values):
    total = sum(sizes)
    scores = {
        "distinct": random.permutation(total).astype("float32"),
        "equal": np.ones(total, "float32"),
        "two": random.integers(0, 2, total),
        "half_zero": random.normal(size=total) * random.integers(0, 2, total),
    }[values]
    parts = np.split(scores, np.cumsum(sizes)[:-1])
    for level in (0, 0.01, 0.29, 0.5, 0.9, 0.999):
        masks = smallest(parts, level)
        stays = np.concatenate(masks)
        removed = total - int(stays.sum())
        assert (
            removed == removed_count(total, level)
            and 0 <= total * level - removed + 1e-6 < 1 + 2e-6
        )
        assert level_of(masks) == removed / total
        if removed > 0:
            assert scores[stays].min() >= scores[~stays].max()
        if values == "equal":
            assert stays[: total - removed].all()


def test_ties_across_pieces_go_from_the_end():
    scores = np.zeros(3 * sparsity.PIECE + 1, "float32")
    scores[0] = -1
    (mask,) = smallest([scores], 0.4)
    removed = removed_count(len(scores), 0.4)
    assert not mask[0] and mask[1 : len(mask) - removed + 1].all()
    assert not mask[len(mask) - removed + 1 :].any()


def test_flat_order_is_that_of_c_whatever_the_memory():
    weight = np.asfortranarray(np.ones((2, 3)))
    (mask,) = smallest([weight], 0.5)
    assert bits(mask) == "111000"
    (mask,) = smallest([np.arange(12.0).reshape(3, 4)[:, ::2].T], 0.5)
    assert mask.tolist() == [[False, False, True], [False, True, True]]


def test_empty_arrays_single_numbers_and_negative_zeros():
    assert smallest([], 0.5) == []
    assert [mask.shape for mask in smallest([np.zeros((0, 3)), np.zeros(0)], 0.5)] == [(0, 3), (0,)]
    assert smallest([np.float32(3)], 0.9)[0].shape == ()
    assert bits(smallest([np.array([-0.0, 0.0, -0.0, 0.0])], 0.5)[0]) == "1100"
    assert smallest((np.ones(2) for _ in range(2)), 0.5)[1].tolist() == [False, False]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_memory_stays_near_one_copy(kind):
    weights = [random.normal(size=(500, 800)).astype("float32") for _ in range(10)]
    tracemalloc.start()
    smallest(weights, 0.5, kind)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(weight.nbytes for weight in weights)


def naive_n_of_m(weight, n, m, axis):
    rows = np.moveaxis(weight, axis, -1)
    stays = np.zeros(rows.shape, bool)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            run = [abs(float(w)) for w in rows[index][start : start + m]]
            best = sorted(range(len(run)), key=lambda i: (-run[i], i))[:n]
            stays[(*index, [start + i for i in best])] = True
    return np.moveaxis(stays, -1, axis)


def test_n_of_m_by_hand():
    row = np.array([3.0, -1.0, 0.0, -4.0, 2.0, 2.0, -2.0, 2.0, 0.0, 0.0, 5.0])
    for n, m, expected in (
        (2, 4, "10011100101"),
        (1, 4, "00011000001"),
        (3, 4, "11011110111"),
        (4, 4, "11111111111"),
        (1, 1, "11111111111"),
        (2, 300, "00010000001"),
    ):
        assert bits(n_of_m(row, n, m, -1)) == expected
        assert bits(n_of_m(row[:, None] * [1, 2], n, m, -2).T) == 2 * expected


@property_test
@given(weight=arrays(), data=st.data())
def test_n_of_m_by_brute_force(weight, data):
    m = data.draw(st.integers(1, 8))
    n = data.draw(st.integers(1, m))
    axis = data.draw(st.integers(-weight.ndim, -1))
    mask = n_of_m(weight, n, m, axis)
    assert mask.dtype == bool and mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, naive_n_of_m(weight, n, m, axis))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (17, 300)])
def test_runs_of_a_convolution_kernel_are_separate_at_every_position(n, m):
    weight = random.normal(size=(3, 2, 38, 5)).astype("float32")
    mask = n_of_m(weight, n, m, -2)
    np.testing.assert_array_equal(mask, naive_n_of_m(weight, n, m, -2))
    for i, j, o in itertools.product(range(3), range(2), range(5)):
        np.testing.assert_array_equal(mask[i, j, :, o], n_of_m(weight[i, j, :, o], n, m, -1))
    runs = [mask[..., start : start + m, :].sum(axis=-2) for start in range(0, 38, m)]
    assert all((run == min(n, 38 - i * m)).all() for i, run in enumerate(runs))


def tfmots_mask(rows, zeros, size):
    """What TFMOT's `generate_m_by_n_mask` defines, on rows of shape (out, in)."""
    padded = np.pad(np.abs(rows), [(0, 0), (0, -rows.shape[1] % size)])
    runs = padded.reshape(-1, size)
    best = np.argsort(-runs, axis=1, kind="stable")[:, : size - zeros]  # as tf.math.top_k
    mask = np.zeros(runs.shape, bool)
    np.put_along_axis(mask, best, True, axis=1)
    return mask.reshape(padded.shape)[:, : rows.shape[1]]


@pytest.mark.parametrize("inputs", range(1, 10))
@pytest.mark.parametrize("zeros", [1, 2])
def test_n_of_m_is_tfmots(inputs, zeros):
    kernel = (random.integers(-4, 5, (inputs, 50)) / 4).astype("float32")
    mask = n_of_m(kernel, 4 - zeros, 4, -2)
    np.testing.assert_array_equal(mask.T, tfmots_mask(kernel.T, zeros, 4))


def naive_block_means(scores, block_shape, axes):
    """Return {block index: (mean, entries)}; the block of an entry is its index over the size."""
    members = {}
    for index in np.ndindex(scores.shape):
        block = list(index)
        for axis, size in zip(axes, block_shape, strict=True):
            block[axis] //= size
        members.setdefault(tuple(block), []).append(index)
    return {
        b: (float(np.mean([scores[i] for i in e], dtype="float64")), e) for b, e in members.items()
    }


def naive_blocks(scores, block_shape, percent, axes):
    members = naive_block_means(scores, block_shape, axes)
    ranking = sorted(members, key=lambda b: (np.float32(members[b][0]), [-i for i in b]))
    mask = np.ones(scores.shape, bool)
    for block in ranking[: len(members) * percent // 100]:
        for index in members[block][1]:
            mask[index] = False
    return mask


def test_blocks_by_hand():
    scores = np.array([[1.0, 2, 0, 1, 9], [3, 4, 1, 0, 9], [1, 1, 5, 5, 1]])
    np.testing.assert_array_equal(block_means(scores, (2, 2)), [[2.5, 0.5, 9], [1, 5, 1]])
    masks = [blocks(scores, (2, 2), sixths / 6 + 1e-9) for sixths in range(6)]
    assert [" ".join(bits(row) for row in mask) for mask in masks] == [
        "11111 11111 11111",
        "11001 11001 11111",
        "11001 11001 11110",  # of two means of 1, the later
        "11001 11001 00110",
        "00001 00001 00110",
        "00001 00001 00000",
    ]


@property_test
@given(scores=arrays(), percent=percentages, data=st.data())
def test_blocks_by_brute_force(scores, percent, data):
    axes = data.draw(st.lists(st.integers(-scores.ndim, -1), unique=True))
    block_shape = data.draw(st.lists(st.integers(1, 8), min_size=len(axes), max_size=len(axes)))
    means = block_means(scores, block_shape, axes)
    expected = naive_block_means(scores, block_shape, axes)
    assert means.size == len(expected) and means.dtype == np.float32
    for block, (mean, _) in expected.items():
        assert means[block] == pytest.approx(mean, abs=1e-7)
    if all(means[block] == np.float32(mean) for block, (mean, _) in expected.items()):
        mask = blocks(scores, block_shape, percent / 100, axes)
        np.testing.assert_array_equal(mask, naive_blocks(scores, block_shape, percent, axes))


def test_the_count_of_blocks_is_exact():
    for shape in ((8, 8), (7, 9), (3, 3, 10, 6)):
        for block_shape in ((2, 2), (4, 1), (1, 4), (3, 5), (20, 20)):
            for scores in (random.normal(size=shape), np.ones(shape)):
                count = block_means(scores, block_shape).size
                for level in (0, 0.29, 0.5, 0.99):
                    mask = blocks(scores, block_shape, level)
                    means = block_means(mask, block_shape)
                    assert np.isin(means, (0, 1)).all()  # whole blocks
                    assert np.count_nonzero(means == 0) == removed_count(count, level)


def test_blocks_along_given_axes():
    scores = np.arange(24.0).reshape(2, 3, 4)
    mask = blocks(scores, (2, 3), 0.5, axes=(-3, -2))
    np.testing.assert_array_equal(mask, np.broadcast_to([False, False, True, True], (2, 3, 4)))
    np.testing.assert_array_equal(
        block_means(scores, (3, 2), (-2, -3)), block_means(scores, (2, 3), (-3, -2))
    )
    (one,) = smallest([scores], 0.3)
    np.testing.assert_array_equal(blocks(scores, (), 0.3), one)


def test_one_ranking_of_blocks_over_several_arrays():
    scores = [np.arange(16.0).reshape(4, 4), np.arange(6.0).reshape(2, 3)]
    stays = smallest([block_means(array, (2, 2)) for array in scores], 0.5)
    masks = [spread(s, a.shape, (2, 2)) for s, a in zip(stays, scores, strict=True)]
    # Means 2.5, 4.5, 10.5, 12.5 and 2, 3.5.
    assert [bits(mask) for mask in masks] == ["0011001111111111", "000000"]


@property_test
@given(scores=arrays(), data=st.data())
def test_spread_is_the_way_back(scores, data):
    block_shape = data.draw(st.lists(st.integers(1, 8), max_size=scores.ndim))
    means = block_means(scores, block_shape)
    wide = spread(means, scores.shape, block_shape)
    assert wide.shape == scores.shape
    np.testing.assert_allclose(block_means(wide, block_shape), means, rtol=1e-6)


def test_pooled_by_hand():
    scores = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    np.testing.assert_array_equal(pooled(scores, "fine"), scores)
    np.testing.assert_array_equal(pooled(scores, "per_dim", axis=-1), [[2, 3, 7]] * 2)
    np.testing.assert_array_equal(pooled(scores, "per_dim", axis=-2), [[3] * 3, [5] * 3])
    wide = pooled(scores, "block", sparse_factors=(2, 2))
    np.testing.assert_array_equal(wide, [[2.5, 2.5, 7]] * 2)
    np.testing.assert_array_equal(pooled(scores[0], "per_dim", axis=-1), scores[0])
    assert pooled(np.zeros((0, 3)), "per_dim", axis=-1).shape == (0, 3)
    assert pooled(scores, "fine").dtype == wide.dtype == np.float32


def test_pooled_structures_of_a_convolution_kernel():
    scores = random.normal(size=(3, 3, 4, 6))
    wide = pooled(scores, "per_dim", axis=-1)
    np.testing.assert_allclose(wide[1, 2, 3], scores.mean(axis=(0, 1, 2)), rtol=1e-6)
    wide = pooled(scores, "block", sparse_factors=(4, 2))
    np.testing.assert_allclose(wide[0, 1, 2, 3], scores[0, 1, :, 2:4].mean(), rtol=1e-6)


def test_level_of():
    assert level_of([]) == level_of([np.zeros((0, 2))]) == 0
    assert level_of([np.zeros(2), np.ones((2, 3), bool)]) == 0.25
    assert level_of([np.zeros(3)]) == 1 and level_of([np.ones(3)]) == 0


@pytest.mark.parametrize("level", [-0.1, 1, 1.5, math.nan])
def test_levels_are_checked(level):
    for call in (
        lambda: removed_count(4, level),
        lambda: smallest([np.ones(4)], level),
        lambda: blocks(np.ones((4, 4)), (2, 2), level),
    ):
        with pytest.raises(ValueError, match=rf"level in \[0, 1\). Received: level={level}"):
            call()


KERNEL = np.ones((4, 6))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: importances(KERNEL, "l1"), "one of abs, normed_abs. Received: kind='l1'"),
        (lambda: smallest([KERNEL], 0.5, "l1"), "Received: kind='l1'"),
        (lambda: pooled(KERNEL, "row"), "one of fine, block, per_dim. Received: mode='row'"),
        (
            lambda: pooled(KERNEL, "block"),
            "sparse_factors for mode='block'.*mode='block', sparse_fa",
        ),
        (lambda: pooled(KERNEL, "fine", (1, 1)), r"mode='fine', sparse_factors=\(1, 1\)"),
        (lambda: pooled(KERNEL, "per_dim"), "axis for mode='per_dim'.*mode='per_dim', axis=None"),
        (lambda: pooled(KERNEL, "block", (2, 2), axis=-1), "mode='block', axis=-1"),
        (lambda: pooled(KERNEL, "per_dim", axis=0), r"in \[-2, -1\].*\(4, 6\). Received: axis=0"),
        (lambda: removed_count(-1, 0.5), "at least 0. Received: total=-1"),
        (lambda: n_of_m(KERNEL, 0, 4, -2), "at least 1. Received: n=0"),
        (lambda: n_of_m(KERNEL, 2.0, 4, -2), "at least 1. Received: n=2.0"),
        (lambda: n_of_m(KERNEL, 1, 0, -2), "at least 1. Received: m=0"),
        (lambda: n_of_m(KERNEL, 5, 4, -2), "n of at most m. Received: n=5, m=4"),
        (lambda: n_of_m(KERNEL, 2, 4, 0), r"in \[-2, -1\].*Received: axis=0"),
        (lambda: n_of_m(KERNEL, 2, 4, -3), r"shape \(4, 6\). Received: axis=-3"),
        (lambda: blocks(KERNEL, (2, 0), 0.5), "at least 1. Received: size of a block=0"),
        (lambda: blocks(KERNEL, (2, 1.5), 0.5), "Received: size of a block=1.5"),
        (lambda: blocks(KERNEL, (1, 2, 2), 0.5), r"\[-2, -1\].*Received: axes=-3"),
        (lambda: blocks(KERNEL, (2, 2), 0.5, (-1, -1)), r"distinct axes.*axes=\(-1, -1\)"),
        (lambda: blocks(KERNEL, (2, 2), 0.5, (-1,)), r"block_shape=\(2, 2\), axes=\(-1,\)"),
        (
            lambda: spread(KERNEL, (4, 6), (2, 2)),
            r"shape \(2, 3\). Received: values of shape \(4, 6",
        ),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_scores_are_checked(value):
    scores = np.array([[1.0, value, 2.0]])
    for call in (
        lambda: smallest([np.ones(3), scores], 0.5),
        lambda: smallest([scores], 0.5, "normed_abs"),
        lambda: importances(scores, "abs"),
    ):
        with pytest.raises(ValueError, match=r"finite.*shape \(1, 3\), 1 of them NaN or infinite"):
            call()
    if not math.isfinite(value):
        with pytest.raises(ValueError, match=r"shape \(1, 3\), 1 of them"):
            n_of_m(scores, 1, 2, -1)
