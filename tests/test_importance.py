"""Importance against naive loops, and the selection of channels against its definition."""

import doctest
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_compress import importance
from keras_compress.importance import (
    IMPORTANCE,
    batch_norm_scale,
    channel_scores,
    geometric_median,
    global_keep,
    keep_highest,
    kept_count,
    l1,
    l2,
    normalized,
    random_scores,
)

property_test = settings(deadline=None, derandomize=True, max_examples=300)
percentages = st.integers(0, 99)  # of which exact fractions are known
round_tos = st.sampled_from([1, 2, 3, 4, 8, 16])
score_lists = st.lists(st.integers(-3, 12).map(lambda i: i / 4), min_size=1, max_size=40)
KERNEL = np.random.default_rng(0).normal(0.2, 1.0, (3, 2, 4, 5)).astype("float32")
every_criterion = pytest.mark.parametrize("name", sorted(IMPORTANCE))


def slices(weight, axis):
    return [np.take(weight, i, axis).astype("float64").ravel() for i in range(weight.shape[axis])]


def naive(name, weight, axis):
    filters = slices(weight, axis)
    if name == "L1":
        return [sum(abs(w) for w in f) for f in filters]
    if name == "L2":
        return [math.sqrt(sum(w * w for w in f)) for f in filters]
    return [sum(math.dist(one, other) for other in filters) for one in filters]


def test_configuration_names():
    assert {"L1": l1, "L2": l2, "geometric_median": geometric_median} == IMPORTANCE


def test_examples_in_the_docstrings():
    names = {name: getattr(importance, name) for name in dir(importance)}
    result = doctest.testmod(importance, extraglobs=names)
    assert result.failed == 0 and result.attempted == 8


@every_criterion
@pytest.mark.parametrize("axis", [-1, -2, -3, -4])
def test_criteria_equal_the_naive_loop(name, axis):
    scores = IMPORTANCE[name](KERNEL, axis)
    assert scores.shape == (KERNEL.shape[axis],) and scores.dtype == np.float64
    np.testing.assert_allclose(scores, naive(name, KERNEL, axis), rtol=1e-12)


def test_criteria_by_hand():
    weight = np.array([[1, -2, 0], [2, 2, 0], [-2, 1, 0]])  # filters in columns, integers
    np.testing.assert_array_equal(l1(weight, -1), [5, 5, 0])
    np.testing.assert_array_equal(l2(weight, -1), [3, 3, 0])
    apart = math.sqrt(9 + 0 + 9)
    np.testing.assert_allclose(geometric_median(weight, -1), [apart + 3, apart + 3, 6])


@every_criterion
def test_criteria_of_a_vector_and_of_one_filter(name):
    vector = np.array([3.0, -1.0, 0.0])
    expected = [7, 5, 4] if name == "geometric_median" else [3, 1, 0]
    np.testing.assert_allclose(IMPORTANCE[name](vector, -1), expected)
    one = IMPORTANCE[name](np.full((4, 1), -0.5), -1)
    np.testing.assert_allclose(one, {"L1": [2], "L2": [1]}.get(name, [0]))


@every_criterion
def test_criteria_of_no_filters(name):
    assert IMPORTANCE[name](np.zeros((3, 0)), -2).tolist() == [0, 0, 0]


def test_geometric_median_holds_near_a_large_offset():
    # Differences of 1e-3 around 1000: the plain expansion of the square loses half of the digits.
    weight = 1000 + 1e-3 * np.random.default_rng(1).integers(-9, 10, (6, 7)).astype("float64")
    expected = naive("geometric_median", weight, -1)
    np.testing.assert_allclose(geometric_median(weight, -1), expected, rtol=1e-8)


def test_geometric_median_of_equal_filters_is_zero():
    weight = np.repeat(np.random.default_rng(2).normal(size=(50, 1)), 9, axis=1)
    np.testing.assert_allclose(geometric_median(weight, -1), np.zeros(9), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_geometric_median_in_blocks(rows, monkeypatch):
    expected = naive("geometric_median", KERNEL, -1)
    monkeypatch.setattr(importance, "ROWS_AT_ONCE", rows)
    np.testing.assert_allclose(geometric_median(KERNEL, -1), expected, rtol=1e-12)


@every_criterion
@pytest.mark.parametrize("axis", [0, 1, -5, None, -1.0])
def test_axis_is_checked(name, axis):
    with pytest.raises(ValueError, match=rf"\[-4, -1\].*\(3, 2, 4, 5\). Received: axis={axis}"):
        IMPORTANCE[name](KERNEL, axis)


def test_batch_norm_scale():
    np.testing.assert_array_equal(batch_norm_scale(np.float32([-2, 0, 0.5])), [2, 0, 0.5])


def test_random_scores():
    scores = random_scores(10_000, seed=3)
    assert scores.shape == (10_000,) and scores.min() > 0 and scores.max() < 1
    np.testing.assert_array_equal(scores, random_scores(10_000, seed=3))
    assert not np.array_equal(scores, random_scores(10_000, seed=4))
    deciles, _ = np.histogram(scores, 10, (0, 1))
    assert abs(deciles - 1000).max() < 150  # five standard deviations
    assert random_scores(0, seed=0).shape == (0,)


def test_normalized():
    np.testing.assert_allclose(normalized([[2, -1], [0, 2]]), np.array([[2, -1], [0, 2]]) / 3)
    np.testing.assert_array_equal(normalized(np.zeros((2, 3))), np.zeros((2, 3)))
    np.testing.assert_allclose(normalized(KERNEL), normalized(1e-20 * KERNEL.astype("float64")))
    assert np.square(normalized(KERNEL)).sum() == pytest.approx(1)


def test_channel_scores():
    scores, channels = [1.0, 2.0, 4.0, 8.0], [3, 0, 3, 1]
    np.testing.assert_array_equal(channel_scores(scores, channels, 5), [2, 8, 0, 5, 0])
    none = channel_scores([], np.zeros(0, int), 2)
    assert none.tolist() == [0, 0] and none.dtype == np.float64


@pytest.mark.parametrize(
    "scores, channels, message",
    [
        ([1.0, 2.0], [0], r"one channel for each.*scores.shape=\(2,\), channels.shape=\(1,\)"),
        ([[1.0]], [[0]], "of rank 1"),
        ([1.0], [0.0], "whole numbers. Received: channels.dtype=float64"),
        ([1.0, 1.0], [0, 3], r"in \[0, 3\). Received: channels from 0 to 3, count=3"),
        ([1.0, 1.0], [-1, 2], "channels from -1 to 2"),
    ],
)
def test_channels_are_checked(scores, channels, message):
    with pytest.raises(ValueError, match=message):
        channel_scores(scores, channels, 3)


@pytest.mark.parametrize(
    "total, level, round_to, kept",
    [
        (64, 0, 8, 64),
        (64, 0.5, 8, 32),
        (64, 0.49, 8, 40),  # 32.64 stay
        (64, 0.51, 8, 32),  # 31.36 stay
        (20, 0.5, 8, 16),
        (20, 0.1, 8, 20),  # 18 round to 24: none go
        (8, 0.9, 8, 8),
        (5, 0.9, 8, 5),
        (16, 0.999, 8, 8),
        (10, 0.3, 1, 7),
        (100, 0.29, 1, 71),
        (100, 0.58, 1, 42),  # 100 * 0.58 is 57.99999999999999 in floats
        (10, 0.7, 3, 3),
        (10, 0.55, 1, 5),
        (10, 0.99, 1, 1),
        (1, 0.5, 1, 1),
        (4, 1 - 1e-12, 1, 1),
    ],
)
def test_kept_count_by_hand(total, level, round_to, kept):
    assert kept_count(total, level, round_to) == kept


@property_test
@given(total=st.integers(1, 5000), percent=percentages, round_to=st.integers(1, 70))
def test_kept_count_is_nncfs_formula_in_exact_arithmetic(total, percent, round_to):
    stay = total - total * Fraction(percent, 100)
    removed = max(total - math.ceil(stay / round_to) * round_to, 0)
    kept = kept_count(total, percent / 100, round_to)
    assert kept == total - removed and type(kept) is int
    assert 1 <= kept <= total and (kept % round_to == 0 or kept == total)
    if round_to >= total:
        assert kept == total


@property_test
@given(total=st.integers(1, 500), pair=st.tuples(*[st.floats(0, 0.9999)] * 2), round_to=round_tos)
def test_kept_count_falls_with_the_level(total, pair, round_to):
    low, high = sorted(pair)
    assert kept_count(total, low, round_to) >= kept_count(total, high, round_to)


def test_keep_highest_by_hand():
    scores = [2, 1, 3, 2, 2]
    expected = ["00000", "00100", "10100", "10110", "10111", "11111"]
    for count, bits in enumerate(expected):
        kept = keep_highest(scores, count)
        assert kept.dtype == bool and kept.tolist() == [bit == "1" for bit in bits]


@property_test
@given(scores=score_lists, data=st.data())
def test_keep_highest_keeps_none_that_is_worse(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    kept = keep_highest(scores, count)
    assert kept.sum() == count
    for i, j in itertools.permutations(range(len(scores)), 2):
        if kept[i] and not kept[j]:
            assert scores[i] > scores[j] or (scores[i] == scores[j] and i < j)


def test_global_keep_by_hand():
    groups = [[1.0, 9.0, 2.0, 8.0], [3.0, 4.0, 7.0, 10.0], [5.0, 6.0]]

    def kept(**kwargs):
        return ["".join(str(int(k)) for k in group) for group in global_keep(groups, **kwargs)]

    assert kept(level=0, round_to=1) == ["1111", "1111", "11"]
    assert kept(level=0.3, round_to=1) == ["0101", "0111", "11"]
    assert kept(level=0.59, round_to=1) == ["0101", "0011", "01"]
    # All of the last group are candidates; one comes back, whatever the quota.
    assert kept(level=0.6, round_to=1, quota=1) == ["0101", "0011", "01"]
    assert kept(level=0.9, round_to=1, quota=1) == ["0100", "0001", "01"]
    # A quota of 0.25 lets one of four go, and none of two.
    assert kept(level=0.6, round_to=1, quota=0.25) == ["0111", "0111", "11"]
    # Pairs: the better of a lonely candidate comes back.
    assert kept(level=0.3, round_to=2) == ["0101", "1111", "11"]
    assert kept(level=0.9, round_to=4) == ["1111", "1111", "11"]
    assert kept(level=0.9, round_to=1, quota=0) == ["1111", "1111", "11"]


def test_global_keep_counts_in_decimals():
    # 100 * 0.29 is 28.999999999999996 in floats.
    for level, quota in ((0.29, 1), (0.99, 0.29)):
        (kept,) = global_keep([np.arange(100)], level, 1, quota)
        assert kept.tolist() == [False] * 29 + [True] * 71


def test_global_keep_breaks_ties_by_group_and_position():
    kept = global_keep([[1.0, 1.0], [1.0, 1.0, 1.0]], level=0.4, round_to=1)
    assert [group.tolist() for group in kept] == [[True, True], [True, False, False]]


def naive_global_keep(groups, percent, round_to, tenths):
    """Walk up the ranking one channel at a time, in exact arithmetic."""
    ranking = sorted(
        (score, -g, -i) for g, group in enumerate(groups) for i, score in enumerate(group)
    )
    kept = [[True] * len(group) for group in groups]
    for _, g, i in ranking[: len(ranking) * percent // 100]:
        size = len(groups[-g])
        if kept[-g].count(False) + 1 <= size * tenths // 10:
            kept[-g][-i] = False
    for group, mask in zip(groups, kept, strict=True):
        best_first = sorted(range(len(group)), key=lambda i: (-group[i], i))
        for i in best_first:  # those that went come back, the best first
            if mask.count(True) % round_to == 0 and any(mask):
                break
            mask[i] = True
    return kept


@property_test
@given(
    groups=st.lists(score_lists, min_size=1, max_size=6),
    percent=percentages,
    round_to=round_tos,
    tenths=st.integers(0, 10),
)
def test_global_keep_equals_the_naive_walk(groups, percent, round_to, tenths):
    kept = global_keep(groups, percent / 100, round_to, tenths / 10)
    expected = naive_global_keep(groups, percent, round_to, tenths)
    assert [mask.tolist() for mask in kept] == expected
    for group, mask in zip(groups, kept, strict=True):
        assert mask.any() and (mask.sum() % round_to == 0 or mask.all())
        assert 10 * (~mask).sum() <= tenths * len(group)
    assert 100 * sum((~mask).sum() for mask in kept) <= percent * sum(map(len, groups))


@property_test
@given(
    groups=st.lists(score_lists, min_size=1, max_size=6),
    pair=st.tuples(percentages, percentages).map(sorted),
    round_to=round_tos,
)
def test_what_goes_at_a_level_goes_at_a_higher_one(groups, pair, round_to):
    fewer, more = (global_keep(groups, percent / 100, round_to) for percent in pair)
    assert all((high <= low).all() for low, high in zip(fewer, more, strict=True))


def test_one_group_without_quota_is_the_local_selection():
    scores = np.random.default_rng(5).normal(size=100)
    for percent in range(100):
        (kept,) = global_keep([scores], percent / 100, 8, quota=1)
        local = keep_highest(scores, kept_count(100, percent / 100, 8))
        np.testing.assert_array_equal(kept, local)


def test_no_groups_and_empty_groups():
    assert global_keep([], 0.5, 1) == []
    assert [group.tolist() for group in global_keep([[], [1.0]], 0.5, 1)] == [[], [True]]


@pytest.mark.parametrize("level", [-0.1, 1, 1.5, np.nan])
def test_levels_are_checked(level):
    for call in (lambda: kept_count(4, level, 1), lambda: global_keep([[1.0]], level, 1)):
        with pytest.raises(ValueError, match=rf"\[0, 1\). Received: level={level}"):
            call()


@pytest.mark.parametrize("quota", [-0.1, 1.1, np.nan])
def test_quota_is_checked(quota):
    with pytest.raises(ValueError, match=rf"fraction in \[0, 1\]. Received: quota={quota}"):
        global_keep([[1.0]], 0.5, 1, quota)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kept_count(0, 0.5, 1), "at least 1. Received: total=0"),
        (lambda: kept_count(8, 0.5, 0), "at least 1. Received: round_to=0"),
        (lambda: kept_count(8, 0.5, 2.0), "at least 1. Received: round_to=2.0"),
        (lambda: global_keep([[1.0]], 0.5, 0), "at least 1. Received: round_to=0"),
        (lambda: keep_highest([1.0], -1), "at least 0. Received: count=-1"),
        (lambda: keep_highest([1.0], 2), "at most 1. Received: count=2"),
        (lambda: random_scores(-1, 0), "at least 0. Received: count=-1"),
        (lambda: channel_scores([1.0], [0], 1.5), "at least 0. Received: count=1.5"),
    ],
)
def test_counts_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_are_checked(value):
    for call in (
        lambda: keep_highest([1.0, value], 1),
        lambda: global_keep([[1.0], [2.0, value]], 0.5, 1),
    ):
        with pytest.raises(ValueError, match=r"scores.shape=\(2,\), 1 of them NaN or infinite"):
            call()
    with pytest.raises(ValueError, match=r"rank 1. Received: scores.shape=\(1, 1\)"):
        keep_highest([[1.0]], 1)


def test_a_shift_moves_the_steps_and_nothing_else():
    """64 channels in multiples of 8: half of the way to the next multiple goes down, not up."""
    counts = [kept_count(64, level, 8, shift=0.5) for level in (0.0, 0.05, 0.07, 0.125, 0.2, 0.99)]
    assert counts == [64, 64, 56, 56, 48, 8]
    with pytest.raises(ValueError, match="shift=1"):
        kept_count(64, 0.5, 8, shift=1)
