"""Values and gradients of fake quantization against an independent float64 reference.

The file runs under whichever backend Keras runs on. At its end the hand-computed numbers are
checked in a child process on each other backend that is installed.
"""

import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from backend_helpers import BACKEND, numpy, value_and_gradients
from keras import ops

from keras_compress.fake_quantize import (
    Asymmetric,
    RangeTraining,
    Symmetric,
    fake_quantize,
    nudged_range,
    observe,
)

TOLERANCE = 1e-6
SHAPE = (5, 4, 3, 6)
AXES = [None, (-1,), (-2,), (-2, -1)]


def symmetric_levels(bits, signed, narrow):
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


class Reference:
    """The published formulas in float64: `low`, `range` and both directions."""

    def __init__(self, low, range, levels, ratio):
        self.low, self.range, self.levels, self.ratio = low, range, levels, ratio

    @classmethod
    def symmetric(cls, scale, level_low, level_high):
        scale = np.abs(np.float64(scale)) + 1e-16
        low = scale * level_low / level_high
        return cls(low, scale - low, level_high - level_low + 1, level_low / level_high)

    @classmethod
    def asymmetric(cls, low, range, level_high):
        low, range = np.float64(low), np.abs(np.float64(range)) + 1e-16
        tuned = np.vectorize(cls._tune)(low, range, level_high)
        return cls(tuned[0], tuned[1] - tuned[0], level_high + 1, 0.0)

    @staticmethod
    def _tune(low, range, n):
        low, high = min(low, 0.0), max(low + range, 0.0)
        zero_point = np.round(-low * n / (high - low))
        new_low = zero_point / (zero_point - n) * high if zero_point < n else low
        new_high = (zero_point - n) / zero_point * low if zero_point > 0 else high
        if high - new_low > new_high - low:
            return new_low, high
        return low, new_high

    def forward(self, x):
        k = (self.levels - 1) / self.range
        zero_point = np.round(-self.low * k)
        shifted = (np.clip(x, self.low, self.low + self.range) - self.low) * k
        return (np.floor(shifted + 0.5) - zero_point) / k

    def backward(self, g, x, kept):
        """Return dx and, for low and range, pairs (gradient, sum of absolute contributions)."""
        below, above = x < self.low, x > self.low + self.range
        inside = ~(below | above)
        error = (self.forward(x) - x) / self.range
        axes = tuple(i for i in range(-x.ndim, 0) if i not in (kept or ()))

        def total(terms):
            return tuple(a.sum(axis=axes, keepdims=bool(kept)) for a in (terms, abs(terms)))

        d_range = g * (error * inside + self.ratio * below + above)
        return g * inside, total(g * (below | above)), total(d_range)

    def away_from_edges(self, x):
        """Replace inputs within float32 rounding of a tie or a bound by zero."""
        code = (x - self.low) / self.range * (self.levels - 1)
        distance = np.abs(np.mod(code, 1.0) - 0.5)
        bound = np.minimum(abs(code), abs(code - self.levels + 1))
        return np.where((distance < 1e-3) | (bound < 1e-3), np.float32(0), x)


def variable_shape(axis):
    if axis is None:
        return ()
    return tuple(n if i - len(SHAPE) in axis else 1 for i, n in enumerate(SHAPE))


def check(parametrization, parameters, reference, axis, seed):
    random = np.random.default_rng(seed)
    x = reference.away_from_edges(random.normal(size=SHAPE).astype("float32"))
    g = random.normal(size=SHAPE).astype("float32")

    value, (dx, *gradients) = value_and_gradients(
        lambda x, *p: fake_quantize(x, p, parametrization), [x, *parameters], g
    )
    expected_dx, *expected = reference.backward(np.float64(g), np.float64(x), axis)

    np.testing.assert_allclose(value, reference.forward(np.float64(x)), rtol=TOLERANCE)
    np.testing.assert_array_equal(dx, expected_dx)
    # Terms of both signs cancel, so a sum's error is measured against the sum of their sizes.
    for gradient, (exact, size) in zip(gradients[::-1], expected[::-1], strict=False):
        assert gradient.shape == variable_shape(axis)
        assert np.all(abs(gradient - exact) <= TOLERANCE * size)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_symmetric_equals_reference(bits, signed, narrow, axis):
    level_low, level_high = symmetric_levels(bits, signed, narrow)
    scale = np.random.default_rng(bits).uniform(0.6, 0.9, variable_shape(axis)).astype("float32")
    if level_low:  # low lies at -2 * scale for two bits: keep some inputs below it
        scale = np.float32(scale / max(1.0, -level_low / level_high))
    reference = Reference.symmetric(scale, level_low, level_high)
    check(Symmetric(level_low, level_high), [scale], reference, axis, seed=bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_asymmetric_equals_reference(bits, narrow, axis):
    random = np.random.default_rng(bits + 10)
    low = random.uniform(-0.7, -0.5, variable_shape(axis)).astype("float32")
    length = random.uniform(1.0, 1.4, variable_shape(axis)).astype("float32")
    level_high = 2**bits - 1 - narrow
    reference = Reference.asymmetric(low, length, level_high)
    check(Asymmetric(level_high), [low, length], reference, axis, seed=bits)


def test_asymmetric_grid_with_under_half_a_step_on_one_side_of_zero_is_moved_to_zero():
    """The published tuning leaves zero between two levels here, up to half a step off."""
    low, high, step = (
        float(numpy(a)) for a in nudged_range([np.float32(-0.2), np.float32(3.2)], Asymmetric(3))
    )
    assert low == 0
    assert high == pytest.approx(3.2, rel=1e-6)
    assert step == pytest.approx(3.2 / 3, rel=1e-6)


@pytest.mark.parametrize("low, length", [(0.3, 0.5), (-0.9, 0.5), (0.0, 0.7), (-0.7, 0.7)])
def test_asymmetric_range_on_one_side_of_zero_is_widened_to_zero(low, length):
    parameters = [np.float32(low), np.float32(length)]
    reference = Reference.asymmetric(*parameters, 15)
    check(Asymmetric(15), parameters, reference, None, seed=3)


def test_golden_values_and_gradients_of_two_bits():
    """Worked by hand: scale 1, levels -2 to 1, so step 1, low -2, high - low = 3."""
    x = np.array([-3.0, -1.5, -0.4, 0.2, 0.7, 5.0], "float32")
    value, (dx, d_scale) = value_and_gradients(
        lambda x, scale: fake_quantize(x, (scale,), Symmetric(-2, 1)),
        [x, np.float32(1)],
        np.ones(6, "float32"),
    )
    assert value.tolist() == [-2, -1, 0, 0, 1, 1]  # the tie at -1.5 goes up
    assert dx.tolist() == [0, 1, 1, 1, 1, 0]
    terms = [-2, 0.5 / 3, 0.4 / 3, -0.2 / 3, 0.3 / 3, 1]
    assert float(d_scale) == pytest.approx(sum(terms), rel=1e-6)


def test_golden_values_and_gradients_of_an_asymmetric_grid():
    """Worked by hand: [-1, 2] with 4 levels has step 1 and zero on its grid already."""
    x = np.array([-1.25, -0.75, 0.25, 1.75, 4.0], "float32")
    g = np.array([1.0, 2.0, 4.0, 8.0, 16.0], "float32")
    value, (dx, d_low, d_range) = value_and_gradients(
        lambda x, low, range: fake_quantize(x, (low, range), Asymmetric(3)),
        [x, np.float32(-1), np.float32(3)],
        g,
    )
    assert value.tolist() == [-1, -1, 0, 2, 2]
    assert dx.tolist() == [0, 2, 4, 8, 0]
    assert float(d_low) == 17
    assert float(d_range) == pytest.approx((-0.25 * 2 - 0.25 * 4 + 0.25 * 8) / 3 + 16, rel=1e-6)


def test_golden_signed_full_range_reaches_one_step_further_down():
    """Eight bits, scale 1: [-128/127, 1] in steps of 1/127, not [-1, 1] in steps of 2/255."""
    low, high, step = (float(numpy(a)) for a in nudged_range([np.float32(1)], Symmetric(-128, 127)))
    assert low == pytest.approx(-128 / 127, rel=1e-6)
    assert high == pytest.approx(1, rel=1e-6)
    assert step == pytest.approx(1 / 127, rel=1e-6)


GRIDS = [
    *(Symmetric(*symmetric_levels(*c)) for c in itertools.product((2, 3, 4, 8), (0, 1), (0, 1))),
    Symmetric(-63, 63),
    *(Asymmetric(n) for n in (3, 14, 15, 127, 255, 65535)),
]


@pytest.mark.parametrize("parametrization", GRIDS, ids=repr)
def test_zero_stays_zero_and_a_second_time_changes_nothing(parametrization):
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 50)).astype("float32")
    x[::8] = 0
    shape = (1, 50)
    parameters = [random.uniform(0.01, 2.0, shape).astype("float32")]
    if isinstance(parametrization, Asymmetric):
        parameters.insert(0, random.uniform(-1.0, 0.2, shape).astype("float32"))
    once = fake_quantize(x, parameters, parametrization)
    twice = fake_quantize(once, parameters, parametrization)
    assert not numpy(once)[::8].any()
    np.testing.assert_array_equal(numpy(once), numpy(twice))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_that_training_made_negative_or_zero_still_works(scale):
    x = np.linspace(-1, 1, 9, dtype="float32")
    quantize = Symmetric(-127, 127)
    value, (dx, d_scale) = value_and_gradients(
        lambda x, s: fake_quantize(x, (s,), quantize), [x, np.float32(scale)], x
    )
    positive, (_, d_positive) = value_and_gradients(
        lambda x, s: fake_quantize(x, (s,), quantize), [x, np.float32(-scale)], x
    )
    np.testing.assert_array_equal(value, positive)
    assert np.isfinite(d_scale) and d_scale != 0
    assert float(d_scale) == (-float(d_positive) if scale else float(d_positive))


def test_range_gradient_is_scaled_as_asked():
    random = np.random.default_rng(1)
    x, g = random.normal(size=(2, 40, 3)).astype("float32")
    scale = np.full((1, 3), 0.7, "float32")

    def d_scale(training):
        function = lambda x, s: fake_quantize(x, (s,), Symmetric(-7, 7), training)  # noqa: E731
        return value_and_gradients(function, [x, scale], g)[1][1]

    plain = d_scale(RangeTraining())
    np.testing.assert_allclose(d_scale(RangeTraining(multiplier=0.25)), plain / 4, rtol=1e-6)
    within = 7 / 14  # the rounding error counts over the highest value, not over the range
    inside = d_scale(RangeTraining()) - d_scale(RangeTraining(rounding=False))
    plain = plain + inside * (1 / within - 1)
    lsq = plain * 49 / np.sqrt(40 * 7)
    np.testing.assert_allclose(d_scale(RangeTraining(lsq=True)), lsq, rtol=1e-6)
    of_samples = plain * 49 / np.sqrt(7)  # one value per sample and range
    batched = RangeTraining(lsq=True, batched=True)
    np.testing.assert_allclose(d_scale(batched), of_samples, rtol=1e-6)
    assert not d_scale(RangeTraining(learnable=False)).any()


def test_range_on_an_axis_of_size_one():
    x = np.array([[0.3], [-2.0]], "float32")
    scale = np.ones((1, 1), "float32")
    value, (_, d_scale) = value_and_gradients(
        lambda x, s: fake_quantize(x, (s,), Symmetric(-1, 1)), [x, scale], np.ones_like(x)
    )
    assert value.tolist() == [[0], [-1]]
    np.testing.assert_allclose(d_scale, [[-0.3 / 2 - 1]], rtol=1e-6)


def test_observe_hands_over_a_numpy_array():
    seen = []
    observe(ops.convert_to_tensor(np.arange(3.0)), seen.append)
    if BACKEND == "jax":
        import jax

        jax.effects_barrier()
    assert [np.asarray(a).tolist() for a in seen] == [[0, 1, 2]]


def test_tensorflow_graph_holds_the_operations_that_converters_know():
    if BACKEND != "tensorflow":
        pytest.skip("looks at a TensorFlow graph")
    import tensorflow as tf

    for axis, name in [
        (None, "FakeQuantWithMinMaxVars"),
        (-1, "FakeQuantWithMinMaxVarsPerChannel"),
    ]:
        scale = tf.Variable(np.ones(() if axis is None else (1, 6), "float32"))

        @tf.function
        def run(x, scale=scale):
            return fake_quantize(x, (scale,), Symmetric(-8, 7))

        graph = run.get_concrete_function(tf.TensorSpec((None, 6))).graph
        (node,) = (n for n in graph.as_graph_def().node if n.op == name)
        assert node.attr["num_bits"].i == 4 and not node.attr["narrow_range"].b


@pytest.mark.parametrize("scale", [5.0, 6.0, 9.0])
def test_range_ends_at_the_limit_of_the_tensor_as_the_reference_has_it(scale):
    random = np.random.default_rng(0)
    before = random.uniform(-2, 8, SHAPE).astype("float32")
    g = random.normal(size=SHAPE).astype("float32")
    x = np.clip(before, 0, 6)
    reference = Reference.symmetric(min(scale, 6.0), 0, 255)
    exact, size = reference.backward(np.float64(g), np.float64(x), None)[2]
    # The second tensor is what the first is made from: the range clips it at 6 all the same.
    for tensor in (x, before):
        value, (_, d_scale) = value_and_gradients(
            lambda x, p: fake_quantize(x, (p,), Symmetric(0, 255, limit=6.0)),
            [tensor, np.float32(scale)],
            g,
        )
        np.testing.assert_allclose(value, reference.forward(np.float64(x)), rtol=TOLERANCE)
        # Values at the very end of the range count as rounded, by a unit of float32 each.
        assert abs(d_scale - exact) <= 10 * TOLERANCE * size


@pytest.mark.parametrize(
    ("relu", "parametrization", "passed_over"),
    [
        ("relu", Symmetric(0, 255), True),
        ("relu", Symmetric(0, 255, limit=6.0), True),
        ("relu6", Symmetric(0, 255, limit=6.0), True),
        ("relu6", Symmetric(0, 255, limit=3.0), True),
        ("relu6", Symmetric(0, 255), False),
        ("relu", Symmetric(-128, 127), False),
        ("relu", Asymmetric(255), False),
        ("elu", Symmetric(0, 255), False),
    ],
)
def test_tensorflow_graph_leaves_a_relu_to_the_clip_of_the_grid(relu, parametrization, passed_over):
    if BACKEND != "tensorflow":
        pytest.skip("looks at a TensorFlow graph")
    import tensorflow as tf

    activation = getattr(tf.nn, relu)
    parameters = [5.0] if isinstance(parametrization, Symmetric) else [-1.0, 5.0]

    def step(x, *parameters):
        with tf.GradientTape() as tape:
            tape.watch((x, parameters))
            y = fake_quantize(activation(x), parameters, parametrization)
            loss = tf.reduce_sum(y * tf.sin(x))
        return y, *tape.gradient(loss, (x, *parameters))

    x = tf.random.stateless_uniform(SHAPE, (1, 2), -9.0, 9.0)
    inputs = (x, *map(tf.constant, parameters))
    graph = tf.function(step).get_concrete_function(*inputs).graph
    (rounding,) = (op for op in graph.get_operations() if op.type == "FakeQuantWithMinMaxVars")
    assert (rounding.inputs[0].op.type == "Placeholder") == passed_over
    for inside, outside in zip(tf.function(step)(*inputs), step(*inputs), strict=True):
        np.testing.assert_allclose(inside, outside, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", sorted({"tensorflow", "jax", "torch"} - {BACKEND}))
def test_golden_numbers_on_the_other_backends(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    if "KERAS_COMPRESS_CHILD" in os.environ:
        pytest.skip("already in a child process")
    here = pathlib.Path(__file__)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "golden or reference", str(here)],
        env=os.environ | {"KERAS_BACKEND": backend, "KERAS_COMPRESS_CHILD": "1"},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
