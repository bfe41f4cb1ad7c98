"""Contracts over every registered quantizer, and what each one adds."""

import logging

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, layer_gradients, numpy

from keras_compress.quantizers import (
    AsymmetricQuantizer,
    Quantizer,
    SymmetricQuantizer,
    UniformQuantizer,
)
from keras_compress.transforms import TRANSFORMS

QUANTIZERS = [cls for cls in TRANSFORMS.values() if issubclass(cls, UniformQuantizer)]
every_quantizer = pytest.mark.parametrize("cls", QUANTIZERS)
every_width = pytest.mark.parametrize("bits", range(2, 9))
SHAPE = (4, 3, 6)


def data(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def calibrated(cls, x, share=0.7, **kwargs):
    quantizer = cls(**kwargs)
    quantizer.build(x.shape)
    kept = quantizer.axis or ()
    axes = tuple(i for i in range(-x.ndim, 0) if i not in kept)
    low, high = (share * f(axis=axes, keepdims=bool(kept)) for f in (x.min, x.max))
    quantizer.set_range(low, high)
    return quantizer


@every_quantizer
@every_width
@pytest.mark.parametrize("axis", [None, (-1,), (-2, -1)])
@pytest.mark.parametrize("options", [{}, {"narrow_range": True}, {"half_range": True}], ids=str)
def test_contract_of_the_grid(cls, bits, axis, options):
    if options.get("half_range"):
        bits = 8
    x = data(bits)
    x[0] = 0
    quantizer = calibrated(cls, x, bits=bits, axis=axis, **options)
    y = numpy(quantizer(x))
    low, high = quantizer.effective_range()
    codes = y / quantizer.step()

    assert not y[0].any()
    np.testing.assert_array_equal(numpy(quantizer(y)), y)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert (y >= low).all() and (y <= high).all()
    span = (high - low) / quantizer.step()
    np.testing.assert_allclose(span, quantizer.levels - 1, rtol=1e-5)
    assert low.shape == high.shape == quantizer.step().shape == quantizer.variable_shape(SHAPE)
    inside = (x > low) & (x < high)
    assert (abs(y - x) <= quantizer.step() * 0.5001)[inside].all()


@every_quantizer
@pytest.mark.parametrize("axis, shape", [(None, ()), ((-1,), (1, 1, 6)), ((-2, -1), (1, 3, 6))])
def test_shape_of_the_range_variables(cls, axis, shape):
    quantizer = calibrated(cls, data(), axis=axis)
    assert [tuple(v.shape) for v in quantizer.range_variables] == [shape] * len(
        quantizer.range_variables
    )
    assert {id(v) for v in quantizer.trainable_variables} == {
        id(v) for v in quantizer.range_variables
    }


@every_quantizer
def test_save_and_load_are_bitwise(cls, tmp_path):
    x = data()
    quantizer = calibrated(cls, x, bits=5, axis=(-1,), gradient_scale="lsq", lr_multiplier=0.5)
    model = keras.Sequential([keras.Input(SHAPE[1:]), quantizer])
    before = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    twin = loaded.layers[-1]

    assert type(twin) is cls and twin.calibrated and twin.axis == (-1,)
    assert twin.get_config() == quantizer.get_config()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), before)
    for a, b in zip(quantizer.weights, twin.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))


@every_quantizer
def test_uncalibrated_is_identity_and_refuses_to_train(cls):
    quantizer = cls()
    x = data()
    np.testing.assert_array_equal(numpy(quantizer(x)), x)
    with pytest.raises(ValueError, match=r"callbacks\.Compress\(\)"):
        quantizer(x, training=True)


@every_quantizer
def test_observer_sees_the_tensor_and_nothing_is_rounded(cls):
    class Recorder:
        def __init__(self):
            self.seen = []

        def update(self, array):
            self.seen.append(np.array(array))

    quantizer = calibrated(cls, data())
    quantizer.observer = Recorder()
    x = data(1)
    value, (dx, *_) = observed(quantizer, x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(dx, np.ones_like(x))
    assert len(quantizer.observer.seen) >= 1
    np.testing.assert_array_equal(quantizer.observer.seen[-1], x)


def observed(quantizer, x):
    """Value and gradient of the identity, however the backend runs: JAX inside `vjp`."""
    scale = keras.layers.Rescaling(1.0)
    model = keras.Sequential([keras.Input(x.shape[1:]), scale, quantizer])
    quantizer.learnable = False
    for variable in quantizer.range_variables:
        variable.trainable = False
    result = layer_gradients(model, x, np.ones_like(x))
    if BACKEND == "jax":
        import jax

        jax.effects_barrier()
    return result


@every_quantizer
def test_observer_works_in_predict(cls):
    class Counter:
        rows = 0

        def update(self, array):
            self.rows += len(array)

    quantizer = cls()
    model = keras.Sequential([keras.Input(SHAPE[1:]), quantizer])
    quantizer.observer = Counter()
    x = data()
    np.testing.assert_array_equal(model.predict(x, verbose=0, batch_size=2), x)
    assert quantizer.observer.rows == len(x)


@every_quantizer
def test_gradients_reach_the_range(cls):
    x = data()
    quantizer = calibrated(cls, x, axis=(-1,))
    _, (dx, *gradients) = layer_gradients(quantizer, x, np.ones_like(x))
    low, high = quantizer.effective_range()
    np.testing.assert_array_equal(dx, (x >= low) & (x <= high))
    assert len(gradients) == len(quantizer.range_variables)
    assert all(gradient.any() for gradient in gradients)


@every_quantizer
def test_gradient_factors(cls):
    x = data()

    def gradient(**kwargs):
        quantizer = calibrated(cls, x, axis=(-1,), bits=4, **kwargs)
        return layer_gradients(quantizer, x, x)[1][-1], quantizer

    plain, quantizer = gradient()
    np.testing.assert_allclose(gradient(lr_multiplier=0.1)[0], 0.1 * plain, rtol=1e-6)
    level = quantizer.level_high
    clipped = gradient(range_gradient="clipping")[0]
    by_step = clipped + (plain - clipped) * (quantizer.levels - 1) / level
    lsq = by_step * level**2 / np.sqrt(x.size / 6 * level)
    np.testing.assert_allclose(gradient(gradient_scale="lsq")[0], lsq, rtol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_descent_on_the_range_moves_the_step_as_lsq_does(signed):
    """The gradient of the step by the formulas of arXiv:1902.08153, (3) and section 2.2."""
    random = np.random.default_rng(2)
    x, g = random.normal(size=(2, 32, 7)).astype("float32")
    x = x if signed else np.abs(x)
    quantizer = SymmetricQuantizer(bits=3, signed=signed, gradient_scale="lsq")
    quantizer.build((None, 7))  # 32 samples
    quantizer.set_range(np.float32(-0.9 if signed else 0.0), np.float32(0.9))
    lowest, highest = (-4, 3) if signed else (0, 7)
    step = 0.9 / highest
    ratio = x / step
    inside = np.round(ratio) - ratio
    by_step = np.where(ratio <= lowest, lowest, np.where(ratio >= highest, highest, inside))
    expected = (g * by_step).sum() / np.sqrt(7 * highest)
    found = layer_gradients(quantizer, x, g)[1][1]
    np.testing.assert_allclose(found / highest, expected, rtol=2e-4)  # the range is `highest` steps


def test_clipping_leaves_the_rounding_error_out():
    """PACT: the gradient of the range is that of the clipped values (arXiv:1805.06085, (3))."""
    x = np.abs(data())
    for axis in (None, (-1,)):
        quantizer = SymmetricQuantizer(bits=3, signed=False, axis=axis, range_gradient="clipping")
        quantizer.build(x.shape)
        high = np.full(quantizer.variable_shape(x.shape), 0.8, "float32")
        quantizer.set_range(0 * high, high)
        _, (dx, d_range) = layer_gradients(quantizer, x, np.ones_like(x))
        kept = None if axis is None else tuple(range(x.ndim - 1))
        over = (x > quantizer.effective_range()[1]).sum(axis=kept)
        np.testing.assert_allclose(d_range.reshape(-1), np.reshape(over, -1), rtol=1e-6)
        assert over.min() > 0 and not dx[x > 0.81].any()


@pytest.mark.parametrize("cls", [SymmetricQuantizer, AsymmetricQuantizer])
def test_a_staged_quantizer_waits(cls):
    x = data()
    quantizer = calibrated(cls, x, bits=3, staged=True)
    plain = calibrated(cls, x, bits=3)
    value, (dx, *gradients) = layer_gradients(quantizer, x, np.ones_like(x))
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(dx, np.ones_like(x))
    assert not quantizer.is_on and not any(g.any() for g in gradients)
    quantizer.enable()
    assert quantizer.is_on and plain.is_on
    for one, other in zip(
        keras.tree.flatten(layer_gradients(quantizer, x, x)),
        keras.tree.flatten(layer_gradients(plain, x, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_range_gradient_must_be_known():
    with pytest.raises(ValueError, match="'rounding' or 'clipping'"):
        SymmetricQuantizer(range_gradient="pact")


@every_quantizer
def test_fixed_range_is_not_trainable(cls):
    x = data()
    quantizer = calibrated(cls, x, learnable=False)
    assert not quantizer.trainable_variables
    _, gradients = layer_gradients(quantizer, x, np.ones_like(x))
    assert len(gradients) == 1


@every_quantizer
def test_training_moves_the_range_towards_the_data(cls):
    x = data(shape=(64, 8))
    quantizer = calibrated(cls, x, share=0.2)
    before = quantizer.effective_range()
    model = keras.Sequential([keras.Input((8,)), quantizer])
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    history = model.fit(x, x, epochs=5, verbose=0).history["loss"]
    after = quantizer.effective_range()
    assert history[-1] < history[0]
    assert after[0] < before[0] and after[1] > before[1]


@pytest.mark.parametrize(
    "kwargs, levels",
    [
        ({"bits": 8}, (-128, 127)),
        ({"bits": 8, "narrow_range": True}, (-127, 127)),
        ({"bits": 8, "half_range": True}, (-63, 63)),
        ({"bits": 8, "half_range": True, "narrow_range": True}, (-63, 63)),
        ({"bits": 2, "narrow_range": True}, (-1, 1)),
        ({"bits": 4, "signed": False}, (0, 15)),
        ({"bits": 4, "signed": False, "narrow_range": True}, (0, 14)),
        ({"bits": 8, "signed": False, "half_range": True}, (0, 127)),
    ],
)
def test_levels_of_the_symmetric_quantizer(kwargs, levels):
    quantizer = SymmetricQuantizer(**kwargs)
    assert (quantizer.level_low, quantizer.level_high) == levels
    assert quantizer.levels == levels[1] - levels[0] + 1


@pytest.mark.parametrize(
    "kwargs, high",
    [({}, 255), ({"narrow_range": True}, 254), ({"half_range": True}, 127), ({"bits": 4}, 15)],
)
def test_levels_of_the_asymmetric_quantizer(kwargs, high):
    quantizer = AsymmetricQuantizer(**kwargs)
    assert (quantizer.level_low, quantizer.level_high) == (0, high)


@pytest.mark.parametrize(
    "signed, minimum, expected",
    [(None, 0.0, False), (None, -0.1, True), (True, 0.0, True), (False, 0.0, False)],
)
def test_sign_is_decided_by_the_statistics(signed, minimum, expected):
    quantizer = SymmetricQuantizer(signed=signed)
    quantizer.build((3,))
    quantizer.set_range(minimum, 1.0)
    assert quantizer.signed is expected


def test_forced_unsigned_is_overruled_when_both_signs_are_seen(caplog):
    quantizer = SymmetricQuantizer(signed=False, name="edge")
    quantizer.build((3,))
    with caplog.at_level(logging.WARNING, "keras_compress"):
        quantizer.set_range(-0.5, 1.0)
    assert quantizer.signed is True
    assert "'edge' was set to unsigned but saw negative values down to -0.5" in caplog.text


def test_symmetric_range_and_its_floors():
    quantizer = SymmetricQuantizer(axis=(-1,))
    quantizer.build((2, 4))
    quantizer.set_range(np.array([[-3.0, -20.0, 0.0, -0.01]]), np.array([[1.0, 5.0, 0.0, 0.02]]))
    np.testing.assert_allclose(numpy(quantizer.scale), [[3.0, 20.0, 0.2, 0.2]], rtol=1e-6)

    quantizer = SymmetricQuantizer()
    quantizer.build((2, 4))
    quantizer.set_range(-0.01, 0.02)
    assert float(numpy(quantizer.scale)) == pytest.approx(0.1)


def test_asymmetric_range_is_widened_on_both_sides_to_its_floor():
    quantizer = AsymmetricQuantizer(axis=(-1,))
    quantizer.build((2, 3))
    quantizer.set_range(np.array([[-1.0, 0.01, 0.0]]), np.array([[49.0, 0.03, 0.6]]))
    np.testing.assert_allclose(numpy(quantizer.range), [[50.0, 0.5, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(numpy(quantizer.low), [[-1.0, -0.23, 0.0]], rtol=1e-6)


def test_unsigned_grid_replaces_a_relu():
    x = data()
    quantizer = SymmetricQuantizer(bits=8, signed=False)
    quantizer.build(SHAPE)
    quantizer.set_range(0.0, 2.0)
    np.testing.assert_array_equal(numpy(quantizer(np.maximum(x, 0))), numpy(quantizer(x)))


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "8"])
def test_width_is_checked(bits):
    with pytest.raises(ValueError, match="whole number of bits from 2 to 8. Received: bits="):
        SymmetricQuantizer(bits=bits)


def test_half_range_is_for_eight_bits():
    with pytest.raises(ValueError, match="`half_range` is for 8 bits only. Received: bits=4"):
        SymmetricQuantizer(bits=4, half_range=True)


@pytest.mark.parametrize("axis", [(0,), 3, (), ("last",)])
def test_axis_is_counted_from_the_end(axis):
    with pytest.raises(ValueError, match="axes counted from the end"):
        SymmetricQuantizer(axis=axis)


@pytest.mark.parametrize("axis, shape", [((-3,), (2, 2)), ((-2,), (None, 3))])
def test_kept_axes_must_exist_with_a_known_size(axis, shape):
    with pytest.raises(ValueError, match="must exist and have a known size"):
        SymmetricQuantizer(axis=axis).build(shape)


def test_gradient_scale_is_checked():
    with pytest.raises(ValueError, match="Received: gradient_scale='pact'"):
        SymmetricQuantizer(gradient_scale="pact")


@pytest.mark.parametrize(
    "minimum, maximum, message",
    [(0.0, np.inf, "finite"), (np.nan, 1.0, "finite"), (2.0, 1.0, "minimum <= maximum")],
)
def test_range_is_checked(minimum, maximum, message):
    quantizer = SymmetricQuantizer()
    quantizer.build((3,))
    with pytest.raises(ValueError, match=message):
        quantizer.set_range(minimum, maximum)
    assert not quantizer.calibrated


@pytest.mark.parametrize(
    ("member", "base", "arguments"),
    [
        ("levels", Quantizer, ()),
        ("set_range", Quantizer, (0.0, 1.0)),
        ("quantized", Quantizer, (0.0, False)),
        ("parametrization", UniformQuantizer, ()),
        ("_assign_range", UniformQuantizer, (0.0, 1.0)),
    ],
)
def test_a_quantizer_must_say_what_it_does(member, base, arguments):
    with pytest.raises(NotImplementedError, match=member):
        found = getattr(base(bits=8), member)
        found(*arguments)
