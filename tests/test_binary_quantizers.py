"""Quantizers of one bit and of three values: formulas, gradients, invariants."""

import keras
import numpy as np
import pytest
from backend_helpers import layer_gradients, numpy

from keras_compress.binary_quantizers import (
    Binarizer,
    BinaryActivations,
    BinaryWeights,
    SignWeights,
    TernaryWeights,
)
from keras_compress.transforms import TRANSFORMS

AXES = [None, (-1,), (-2, -1)]
SHAPE = (3, 3, 4, 6)
of_weights = pytest.mark.parametrize("cls", [BinaryWeights, TernaryWeights])
on_axes = pytest.mark.parametrize("axis", AXES)


def weight(seed=0, zeros=0.3):
    """A weight of which some are zero, as behind a mask, and one filter is off wholly."""
    random = np.random.default_rng(seed)
    values = random.normal(size=SHAPE) * (random.random(SHAPE) >= zeros)
    values[..., 1] = 0
    return values.astype("float32")


def channels(values, axis):
    """Return an array of shape (elements, channels) in float64."""
    if axis is None:
        return values.astype("float64").reshape(-1, 1)
    rest = [i for i in range(values.ndim) if i - values.ndim not in axis]
    size = int(np.prod([values.shape[i] for i in axis]))
    return np.moveaxis(values, rest, range(len(rest))).astype("float64").reshape(-1, size)


def expected(cls, values, axis):
    """The published formulas, channel by channel."""
    columns = channels(values, axis)
    rounded = np.zeros_like(columns)
    for w, y in zip(columns.T, rounded.T, strict=True):
        magnitudes = np.abs(w[w != 0])
        if magnitudes.size:
            threshold = 0.7 * magnitudes.mean() if cls is TernaryWeights else 0
            chosen = np.abs(w) > threshold
            y[:] = np.sign(w) * chosen * np.abs(w[chosen]).mean()
    return rounded


@of_weights
@on_axes
def test_weights_follow_the_formula(cls, axis):
    w = weight()
    y = numpy(cls(axis=axis)(w))
    np.testing.assert_allclose(channels(y, axis), expected(cls, w, axis), rtol=1e-6)
    assert y.dtype == np.float32 and y.shape == w.shape


@of_weights
@on_axes
def test_zeros_stay_and_change_nothing(cls, axis):
    w = weight()
    y = numpy(cls(axis=axis)(w))
    assert not y[w == 0].any() and not y[..., 1].any()
    assert np.isfinite(numpy(cls(axis=axis)(np.zeros(SHAPE, "float32")))).all()
    # The same weights with a row of masked ones beside them have the same scale.
    if axis is None or -2 not in axis:
        padded = np.concatenate([w, np.zeros((3, 3, 5, 6), "float32")], axis=-2)
        np.testing.assert_allclose(numpy(cls(axis=axis)(padded))[..., :4, :], y, rtol=1e-6)


@of_weights
@on_axes
@pytest.mark.parametrize("seed", range(5))
def test_rounding_twice_changes_nothing(cls, axis, seed):
    quantizer = cls(axis=axis)
    y = numpy(quantizer(weight(seed) * np.float32(0.1)))
    np.testing.assert_array_equal(numpy(quantizer(y)), y)


def test_one_scale_per_filter_or_per_tensor():
    w = weight(zeros=0)
    per_filter = np.abs(numpy(BinaryWeights(axis=(-1,))(w)))
    assert len(np.unique(per_filter)) == SHAPE[-1]
    assert len(np.unique(np.abs(numpy(BinaryWeights()(w))))) == 2  # one and the zeros
    np.testing.assert_array_equal(per_filter, np.broadcast_to(per_filter[:1, :1, :1], SHAPE))


def test_ternary_weights_have_three_values():
    y = numpy(TernaryWeights(axis=(-1,))(weight(zeros=0)))
    for column in channels(y, (-1,)).T[[0, 2, 3, 4, 5]]:
        low, zero, high = np.unique(column)
        assert low == -high and zero == 0


@of_weights
@on_axes
def test_the_gradient_of_weights_passes_straight_through(cls, axis):
    w, g = weight(), np.random.default_rng(1).normal(size=SHAPE).astype("float32")
    quantizer = cls(axis=axis)
    quantizer.build(SHAPE)
    _, (dw,) = layer_gradients(quantizer, w, g)
    np.testing.assert_array_equal(dw, g)


@of_weights
def test_weights_need_no_calibration(cls):
    quantizer = cls()
    quantizer.build((3,))
    before = quantizer.get_config()
    quantizer.set_range(0.0, 1.0)
    assert quantizer.calibrated and not quantizer.weights
    assert quantizer.get_config() == before
    np.testing.assert_array_equal(numpy(quantizer(np.ones(3, "float32"), training=True)), 1)


def test_widths_and_levels():
    made = BinaryWeights(), TernaryWeights(), BinaryActivations()
    assert [(q.bits, q.levels) for q in made] == [(1, 2), (2, 3), (1, 2)]


def test_a_base_must_say_which_weights_stay():
    with pytest.raises(NotImplementedError, match="SignWeights must define `chosen`"):
        SignWeights(bits=1)(np.ones(3, "float32"))


def activations(scale=1.5, threshold=0.3, **kwargs):
    quantizer = BinaryActivations(**kwargs)
    quantizer.build((None, 6))
    quantizer.set_range(0.0, scale)
    quantizer.threshold.assign(threshold)
    return quantizer


def tensor(seed=0):
    x = np.random.default_rng(seed).normal(size=(50, 6)).astype("float32") * 1.5
    x[0] = 0
    return x


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 2.0])
def test_activations_follow_the_formula(threshold):
    x, quantizer = tensor(), activations(threshold=threshold)
    s, share = 1.5, 1 / (1 + np.exp(-threshold))
    wanted = np.where(x > s * share, s, 0)
    np.testing.assert_allclose(numpy(quantizer(x)), wanted, rtol=1e-6)
    np.testing.assert_allclose(quantizer.cutoff(), s * share, rtol=1e-6)
    np.testing.assert_allclose(quantizer.effective_range(), (0, s), rtol=1e-6)
    assert quantizer.step() == quantizer.effective_range()[1]


@pytest.mark.parametrize("threshold", [-200.0, -20.0, 0.0, 20.0, 200.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 7.7])
def test_zero_and_the_scale_are_kept_whatever_the_threshold(scale, threshold):
    quantizer = activations(scale, threshold)
    x = np.array([[-1.0, 0.0, scale, 2 * scale, quantizer.cutoff(), 0.0]], "float32")
    y = numpy(quantizer(x))
    assert not y[0, [0, 1, 4, 5]].any() and y[0, 3] == quantizer.step()
    np.testing.assert_array_equal(numpy(quantizer(y)), y)


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_the_gradients_of_activations(multiplier):
    """Against the closed form in float64, on values away from the two ends."""
    x, g = tensor(), np.random.default_rng(1).normal(size=(50, 6)).astype("float32")
    quantizer = activations(lr_multiplier=multiplier)
    _, (dx, d_log_scale, d_threshold) = layer_gradients(quantizer, x, g)
    s, p = 1.5, 1 / (1 + np.exp(-0.3))
    upstream, values = np.float64(g), np.float64(x)
    below = values <= s
    y = np.where(values > s * p, s, 0)
    np.testing.assert_array_equal(dx, g * (below & (values >= 0)))
    d_scale = (upstream * (below * (y - values) / s + ~below)).sum()
    d_share = -(upstream * ((values > 0) & (values < s))).sum()
    np.testing.assert_allclose(d_log_scale, multiplier * d_scale * s, rtol=1e-5)
    np.testing.assert_allclose(d_threshold, multiplier * d_share * p * (1 - p), rtol=1e-5)


def test_training_moves_scale_and_threshold():
    x = np.random.default_rng(0).uniform(0, 3, (256, 6)).astype("float32")
    quantizer = BinaryActivations()
    model = keras.Sequential([keras.Input((6,)), quantizer])
    quantizer.set_range(0.0, 1.0)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    target = np.where(x > 1.8, np.float32(2.5), 0)
    history = model.fit(x, target, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    assert quantizer.step() > 1.5


def test_set_range_takes_the_maximum_and_starts_in_the_middle():
    quantizer = BinaryActivations()
    quantizer.build((3,))
    assert not quantizer.calibrated
    quantizer.set_range(np.array([-3.0]), np.array([4.0]))
    assert quantizer.calibrated
    np.testing.assert_allclose(quantizer.step(), 4, rtol=1e-6)
    np.testing.assert_allclose(quantizer.cutoff(), 2, rtol=1e-6)
    quantizer.set_range(-5.0, -1.0)
    np.testing.assert_allclose(quantizer.step(), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("maximum", [np.inf, np.nan])
def test_range_must_be_finite(maximum):
    quantizer = BinaryActivations()
    quantizer.build((3,))
    with pytest.raises(ValueError, match="Expected a finite range. Received: minimum=0.0"):
        quantizer.set_range(0.0, maximum)
    assert not quantizer.calibrated


def test_activations_without_a_range_refuse_to_train():
    x = tensor()
    np.testing.assert_array_equal(numpy(BinaryActivations()(x)), x)
    with pytest.raises(ValueError, match=r"callbacks\.Compress\(\)"):
        BinaryActivations()(x, training=True)


def test_weight_decay_leaves_scale_and_threshold_alone():
    quantizer = activations()
    assert quantizer.undecayed_variables == [quantizer.log_scale, quantizer.threshold]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BinaryWeights(axis=(-1,)),
        lambda: TernaryWeights(axis=(-1,), staged=True),
        lambda: activations(lr_multiplier=0.5, staged=True),
    ],
)
def test_save_and_load_are_bitwise(make, tmp_path):
    quantizer = make()
    model = keras.Sequential([keras.Input((6,)), quantizer])
    quantizer.enable()
    before = model.predict(tensor(), verbose=0)
    model.save(tmp_path / "model.keras")
    twin = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert type(twin.layers[-1]) is type(quantizer) and twin.layers[-1].is_on
    assert twin.layers[-1].get_config() == quantizer.get_config()
    np.testing.assert_array_equal(twin.predict(tensor(), verbose=0), before)


@pytest.mark.parametrize("cls", [c for c in TRANSFORMS.values() if issubclass(c, Binarizer)])
def test_staged_ones_wait(cls):
    quantizer = cls(staged=True)
    quantizer.build((None, 6))
    quantizer.set_range(0.0, 1.0)
    x, g = tensor(), tensor(1)
    value, (dx, *others) = layer_gradients(quantizer, x, g)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(dx, g)
    assert not any(gradient.any() for gradient in others)
    quantizer.enable()
    assert len(np.unique(np.abs(numpy(quantizer(x))))) == 2
