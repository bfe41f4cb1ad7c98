"""Recovering integers from quantized float weights: exactly, or not at all."""

import numpy as np
import pytest

from keras_compress.export.integer_weights import integer_weight


def on_grid(largest, shape=(3, 3, 8, 16), lowest=None, seed=0):
    """Return (weight, codes, step), the step per index of the last axis."""
    random = np.random.default_rng(seed)
    codes = random.integers(-largest if lowest is None else lowest, largest + 1, shape)
    step = random.uniform(1e-4, 1e-1, shape[-1]).astype("float32")
    return codes.astype("float32") * step, codes, step


def restored(found):
    return (found.codes.astype("float64") + found.offset) * found.step


@pytest.mark.parametrize(
    ("largest", "storage"), [(127, "i8"), (63, "i8"), (8, "i8"), (7, "i4"), (2, "i4"), (1, "u2")]
)
def test_symmetric_grids_come_back(largest, storage):
    weight, codes, step = on_grid(largest)
    found = integer_weight(weight, (-1,))
    assert found.codes.dtype == np.int8
    assert found.step.shape == (1, 1, 1, 16)
    assert found.storage == storage
    assert not found.offset.any()
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.step.ravel(), step, rtol=2e-7)


def test_asymmetric_grids_get_an_offset():
    weight, codes, step = on_grid(200, lowest=-55)
    found = integer_weight(weight, (-1,))
    assert found.storage == "i8"
    np.testing.assert_array_equal(found.codes + found.offset, codes)
    np.testing.assert_allclose(restored(found), weight, rtol=4e-7)


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 1), (1, 0), (2, 0), (-1, -3)])
def test_any_axes_can_be_kept(kept):
    random = np.random.default_rng(1)
    shape = (3, 4, 5)
    step_shape = [size if i in [k % 3 for k in kept] else 1 for i, size in enumerate(shape)]
    codes = random.integers(-127, 128, shape)
    step = random.uniform(0.01, 1, step_shape).astype("float32")
    found = integer_weight(codes * step, kept)
    assert found.step.shape == tuple(step_shape)
    np.testing.assert_allclose(restored(found), codes * step, rtol=4e-7)


def test_one_step_for_all_is_found_per_channel():
    weight = np.random.default_rng(2).integers(-127, 128, (64, 8)).astype("float32") * 0.03
    np.testing.assert_allclose(restored(integer_weight(weight, (-1,))), weight, rtol=4e-7)


def test_a_factor_per_channel_does_not_hide_the_grid():
    weight, codes, _ = on_grid(127)
    factor = np.random.default_rng(3).uniform(0.2, 3, 16).astype("float32")
    np.testing.assert_array_equal(integer_weight(weight * factor, (-1,)).codes, codes)


def test_channels_of_zeros_stay_zero():
    weight, codes, _ = on_grid(127)
    weight[..., 3] = 0
    found = integer_weight(weight, (-1,))
    assert not found.codes[..., 3].any()
    assert np.isfinite(found.step).all()


def test_an_all_zero_weight_is_on_every_grid():
    found = integer_weight(np.zeros((4, 4), "float32"), (-1,))
    assert found.storage == "u2"
    assert not restored(found).any()


def test_float_weights_are_on_no_grid():
    weight = np.random.default_rng(4).normal(size=(3, 3, 4, 8)).astype("float32")
    assert integer_weight(weight, (-1,)) is None
    assert integer_weight(weight.reshape(9, 32), (-1,)) is None


def test_one_value_off_the_grid_is_noticed():
    weight, _, step = on_grid(127)
    weight[0, 0, 0, 0] += step[0] / 3
    assert integer_weight(weight, (-1,)) is None


def test_more_than_255_steps_are_too_many():
    weight = np.arange(-200, 201, dtype="float32")[:, None] * 0.1
    assert integer_weight(weight, (-1,)) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_on_no_grid(value):
    weight, _, _ = on_grid(127)
    weight[0, 0, 0, 0] = value
    assert integer_weight(weight, (-1,)) is None


def test_an_empty_weight_is_on_no_grid():
    assert integer_weight(np.zeros((0, 4), "float32"), (-1,)) is None


def test_signs_alone_take_one_bit():
    signs = np.random.default_rng(5).choice([-1, 1], (3, 3, 8, 16)).astype("float32")
    step = np.random.default_rng(6).uniform(0.01, 1, 16).astype("float32")
    found = integer_weight(signs * step, (-1,))
    assert found.storage == "u1"
    np.testing.assert_array_equal(found.codes, signs)
    np.testing.assert_array_equal(restored(found).astype("float32"), signs * step)
    signs[0, 0, 0, 0] = 0
    assert integer_weight(signs * step, (-1,)).storage == "u2"
