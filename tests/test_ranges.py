"""Range estimators against their definitions."""

import numpy as np
import pytest
from backend_helpers import numpy

from keras_compress import ranges
from keras_compress.quantizers import AsymmetricQuantizer, SymmetricQuantizer
from keras_compress.ranges import ESTIMATORS, Grid, Observer

BATCHES = [np.random.default_rng(i).normal(i, 2.0, (7, 5, 4, 3)).astype("float32") for i in (0, 1)]
ALL = np.concatenate(BATCHES)


def estimate(kind, axis=None, batches=BATCHES, **kwargs):
    observer = Observer(kind, axis, **kwargs)
    for batch in batches:
        observer.update(batch)
    return observer.result()


def expected(kind, axis):
    kept = () if axis is None else tuple(4 + i for i in axis)
    everything = tuple(i for i in range(4) if i not in kept)
    sample = tuple(i for i in everything if i != 0)
    options = {"keepdims": True}
    if kind == "mixed_min_max":
        kind = "mean_min_max" if axis is None else "min_max"
    if kind == "min_max":
        pair = ALL.min(everything, **options), ALL.max(everything, **options)
    elif kind == "mean_min_max":
        pair = [f(sample, **options).mean(0, **options) for f in (ALL.min, ALL.max)]
    elif kind == "percentile":
        pair = np.percentile(ALL, (0.1, 99.9), everything, **options)
    elif kind == "mean_percentile":
        pair = np.percentile(ALL, (0.1, 99.9), sample, **options).mean(1, **options)
    else:
        median = np.median(ALL, everything, **options)
        mad = np.median(abs(ALL - median), everything, **options)
        pair = median - 3 * 1.4826 * mad, median + 3 * 1.4826 * mad
    return [a.reshape(()) if axis is None else a for a in pair]


STATISTICS = sorted(set(ESTIMATORS) - {"mse"})  # what the values alone decide, not the grid


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("axis", [None, (-1,), (-2, -1)])
def test_estimators_equal_their_definition(kind, axis):
    for result, exact in zip(estimate(kind, axis), expected(kind, axis), strict=True):
        assert result.dtype == np.float32 and result.shape == exact.shape
        np.testing.assert_allclose(result, exact, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(ESTIMATORS))
def test_batching_does_not_matter(kind):
    for one, other in zip(estimate(kind), estimate(kind, batches=[ALL]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


GRIDS = {
    "signed": Grid(bits=3),
    "two bits": Grid(bits=2),
    "narrow": Grid(bits=4, narrow=True),
    "undecided": Grid(bits=4, signed=None),
    "free": Grid(bits=3, symmetric=False),
}


def rounding_errors(grid, values, low, high):
    """Return the mean squared error of the quantizer itself, per channel, for a range."""
    kind = SymmetricQuantizer if grid.symmetric else AsymmetricQuantizer
    signed = {"signed": grid.signed} if grid.symmetric else {}
    narrow = {"narrow_range": grid.narrow}
    quantizer = kind(bits=grid.bits, axis=(-1,), **narrow, **signed)
    quantizer.build(values.shape)
    quantizer.set_range(low.reshape(1, -1), high.reshape(1, -1))
    return np.square(numpy(quantizer(values)) - values).mean(axis=0)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("positive", [False, True])
def test_mse_is_the_best_range_of_the_quantizer(name, positive):
    random = np.random.default_rng(3)
    values = random.laplace(size=(4000, 3)).astype("float32") * [0.5, 1, 4]
    values = np.abs(values) if positive else values - 0.2
    low, high = values.min(0), values.max(0)
    found = estimate("mse", (-1,), batches=[values], grid=GRIDS[name])
    best = rounding_errors(GRIDS[name], values, *found)
    tried = [rounding_errors(GRIDS[name], values, low * r, high * r) for r in (1, 0.8, 0.6, 0.4)]
    # Of a free range, an end is moved until zero is on the grid, by the quantizer its own way.
    slack = 1.02 if GRIDS[name].symmetric else 1.05
    assert (best <= np.min(tried, axis=0) * slack).all()
    assert (best < 0.8 * tried[0]).all()


def test_mse_judges_many_values_by_some(monkeypatch):
    values = np.random.default_rng(4).laplace(size=(20_000, 20)).astype("float32")
    found = []
    for judged in (2**30, 2**14):
        monkeypatch.setattr(ranges, "JUDGED_VALUES", judged)
        found.append(estimate("mse", batches=[values], grid=Grid(bits=4)))
    (_, every), (_, some) = found
    errors = [rounding_errors(Grid(bits=4), values.reshape(-1, 1), -h, h) for h in (every, some)]
    assert errors[0] <= errors[1] <= 1.02 * errors[0]


def test_mse_of_constants():
    low, high = estimate("mse", batches=[np.full((3, 4), 2.5)])
    assert (low, high) == (-2.5, 2.5)
    low, high = estimate("mse", batches=[np.zeros((3, 4))])
    assert low == high == 0
    low, high = estimate("mse", batches=[np.full((3, 4), 2.5)], grid=Grid(4, signed=None))
    assert (low, high) == (0, 2.5)


@pytest.mark.parametrize("kind", STATISTICS)
def test_constant_tensor_and_vectors(kind):
    low, high = estimate(kind, batches=[np.full((3, 4), 2.5)])
    assert low == high == 2.5
    low, high = estimate(kind, batches=[np.full(6, -1.0)])
    assert low == high == -1


def test_percentiles_are_the_ones_asked_for():
    values = np.linspace(0, 1, 1001)[None]
    low, high = estimate("percentile", batches=[values], min_percentile=10, max_percentile=75)
    assert (low, high) == pytest.approx((0.1, 0.75), rel=1e-5)


@pytest.mark.parametrize("kind", ["percentile", "threesigma"])
def test_memory_is_bounded_and_the_sample_is_fair(kind, monkeypatch):
    monkeypatch.setattr(ranges, "SAMPLED_VALUES", 20_000)
    random = np.random.default_rng(0)
    observer = Observer(kind, min_percentile=5, max_percentile=95)
    for mean in (0.0, 0.0, 8.0, 8.0):  # a late half that a first-come sample would miss
        for _ in range(10):
            observer.update(random.normal(mean, 1.0, (10, 1000)))
    assert observer.estimator.rows.size <= 20_000
    low, high = observer.result()
    if kind == "percentile":  # 5 % of all is 10 % of one half
        assert (low, high) == pytest.approx((-1.2816, 8 + 1.2816), abs=0.1)
    else:
        assert (low + high) / 2 == pytest.approx(4, abs=2.5)


def test_empty_batches_are_passed_over():
    low, high = estimate("min_max", batches=[np.zeros((0, 3)), np.ones((2, 3))])
    assert low == high == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"NaN or infinity in a tensor of shape \(2, 2\)"):
        Observer("min_max").update([[0.0, 1.0], [value, 2.0]])


def test_result_needs_data():
    with pytest.raises(ValueError, match="seen no data"):
        Observer("min_max").result()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Expected one of.*'mixed_min_max'.*kind='max'"):
        Observer("max")


@pytest.mark.parametrize("low, high", [(-1, 50), (60, 50), (50, 101)])
def test_percentiles_are_checked(low, high):
    with pytest.raises(ValueError, match="min_percentile < max_percentile"):
        Observer("percentile", min_percentile=low, max_percentile=high)


def test_the_axis_of_samples_keeps_no_range():
    with pytest.raises(ValueError, match="Axis 0 counts the samples"):
        Observer("min_max", axis=(-2,)).update(np.zeros((2, 3)))
