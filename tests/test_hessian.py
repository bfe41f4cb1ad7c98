"""Hessian traces against closed forms and against full Hessians of small networks."""

import logging
import math

import keras
import models
import numpy as np
import pytest
import scipy.linalg
from backend_helpers import BACKEND, numpy, value_and_gradients
from keras import layers, ops

from keras_compress.data import labelled_batches
from keras_compress.training import hessian
from keras_compress.training.hessian import Trace, hessian_traces


def random_batches(shape, classes, sizes=(8, 5), seed=0):
    random = np.random.default_rng(seed)
    return [
        ([random.normal(size=(n, *shape)).astype("float32")], random.integers(0, classes, n), None)
        for n in sizes
    ]


def classifier(name="small", **first):
    """A smooth network whose three kernels have Hessians of different size."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(3, 3, strides=2, name="conv", **first)(inputs)
    x = layers.BatchNormalization(name="norm")(ops.tanh(x))
    x = layers.Dropout(0.5, name="dropout")(layers.Flatten(name="flatten")(x))
    x = layers.Dense(4, activation="silu", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x), name=name)
    return compiled(models.randomize(model))


def compiled(model, loss=None, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss is None else loss
    model.compile("sgd", loss, **options)
    return model


def kernels(model):
    return {layer.name: layer.kernel for layer in model.layers if hasattr(layer, "kernel")}


def full_traces(model, variables, batches, step=1e-2):
    """Return the average of each Hessian's whole diagonal: one difference of gradients per weight.

    Gradients in NumPy, at w + step and w - step, of the loss as Keras' own `evaluate` has it.
    """
    keys = list(variables)
    samples = [len(inputs[0]) for inputs, _, _ in batches]

    def loss(*values):
        with keras.StatelessScope([(variables[k], v) for k, v in zip(keys, values, strict=True)]):
            total = 0.0
            for ((x,), y, w), n in zip(batches, samples, strict=True):
                tensors = [None if a is None else ops.convert_to_tensor(a) for a in (x, y, w)]
                outputs = model(tensors[0], training=False)
                total += n * model.compute_loss(tensors[0], tensors[1], outputs, tensors[2])
            return total / sum(samples)

    if BACKEND == "jax":
        import jax

        loss = jax.jit(loss)
    values = [numpy(variables[key]).copy() for key in keys]
    traces = {}
    for index, key in enumerate(keys):
        diagonal = []
        for position in np.ndindex(values[index].shape):
            sides = []
            for sign in (1, -1):
                moved = [value.copy() for value in values]
                moved[index][position] += sign * step
                sides.append(value_and_gradients(loss, moved, np.float32(1))[1][index][position])
            diagonal.append((sides[0] - sides[1]) / (2 * step))
        traces[key] = np.mean(diagonal)
    return traces


def unsampled_traces(model, variables, batches):
    """Return the estimates over all rows of a Hadamard matrix in place of random vectors.

    The mean of `v v^T` over its rows is the identity, so that nothing is left to chance.
    """
    total = sum(math.prod(v.shape) for v in variables.values())
    order = 1 << (total - 1).bit_length()
    rows = iter(scipy.linalg.hadamard(order).astype("float32"))
    row = []

    def signs(random, shape):
        if len(row) <= order - total:
            row[:] = next(rows)
        return np.reshape([row.pop() for _ in range(math.prod(shape))], shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian, "_signs", signs)
        return hessian_traces(model, variables, batches, iterations=order, tolerance=0)


def check(found, expected, rel=1e-3):
    assert {key: t.value for key, t in found.items()} == pytest.approx(expected, rel=rel)


def check_sampled(found, expected):
    """Every estimate is within four standard errors."""
    for key, trace in found.items():
        assert abs(trace.value - expected[key]) < 4 * trace.error, (key, trace, expected[key])


def linear(x, units=3, **options):
    inputs = keras.Input((x.shape[1],), name="features")
    model = keras.Model(inputs, layers.Dense(units, name="dense", **options)(inputs))
    return compiled(models.randomize(model), "mse")


@pytest.fixture(scope="module")
def regression():
    random = np.random.default_rng(3)
    x = random.normal(1, 2, (40, 5)).astype("float32")
    y = random.normal(size=(40, 3)).astype("float32")
    return x, y


# Closed forms. The mean of squares over N samples and K outputs: H = 2 / (N K) X^T X per output.


def test_a_linear_model_has_the_closed_form(regression):
    x, y = regression
    model = linear(x)
    variables = {"kernel": model.layers[-1].kernel, ("any", "key"): model.layers[-1].bias}
    batches = labelled_batches((x, y), model.inputs, 9, batch_size=16)  # 16, 16 and 8 samples
    expected = {"kernel": 2 / 3 * np.mean(x**2), ("any", "key"): 2 / 3}
    check(unsampled_traces(model, variables, batches), expected)
    traces = hessian_traces(model, variables, batches, iterations=300, tolerance=0)
    check_sampled(traces, expected)
    assert all(trace.draws == 300 and trace.exact for trace in traces.values())


def test_the_standard_error_has_the_closed_form(regression):
    """The variance of v . Hv is twice the sum of the squares off the diagonal."""
    x, y = regression
    model = linear(x, use_bias=False)
    traces = hessian_traces(model, kernels(model), [([x], y, None)], 400, tolerance=0)
    block = 2 / 3 * x.T @ x / len(x)
    variance = 3 * 2 * np.sum(np.square(block - np.diag(np.diag(block))))
    assert traces["dense"].error == pytest.approx(np.sqrt(variance / 400) / 15, rel=0.1)
    check_sampled(traces, {"dense": np.mean(np.diag(block))})


def test_a_diagonal_hessian_needs_one_draw():
    """v . Hv is the trace itself where nothing is off the diagonal, here in products w * x."""
    x = np.diag([1.0, 2.0, 3.0]).astype("float32")
    model = linear(x, use_bias=False)
    traces = hessian_traces(
        model, kernels(model), [([x], np.zeros((3, 3), "float32"), None)], iterations=1
    )
    (trace,) = traces.values()
    assert trace.value == pytest.approx(2 / 9 * 14 / 3, rel=1e-5)
    assert trace.error == math.inf and trace.draws == 1


def test_a_linear_loss_has_no_curvature(regression):
    """On torch, gradients that depend on nothing have no graph to be differentiated again."""
    x, y = regression
    model = compiled(linear(x), lambda target, output: ops.mean(output - target, axis=-1))
    (trace,) = hessian_traces(model, kernels(model), [([x], y, None)], iterations=30).values()
    assert trace == Trace(0.0, 0.0, hessian.FEWEST_DRAWS, True)


def test_sample_weights(regression):
    x, y = regression
    weights = np.random.default_rng(0).uniform(0, 3, len(x)).astype("float32")
    model = linear(x, use_bias=False)
    batches = labelled_batches((x, y, weights), model.inputs, 9, batch_size=16)
    traces = unsampled_traces(model, kernels(model), batches)
    check(traces, {"dense": 2 / 3 * np.mean(weights[:, None] * x**2)})


def test_regularizers_count_and_those_of_frozen_layers_do_not(regression):
    x, y = regression
    model = linear(x, kernel_regularizer=keras.regularizers.L2(0.7))
    batches = [([x], y, None)]
    plain = linear(x)
    settings = {"iterations": 20, "tolerance": 0}
    (expected,) = hessian_traces(plain, kernels(plain), batches, **settings).values()
    (trace,) = hessian_traces(model, kernels(model), batches, **settings).values()
    assert trace.value == pytest.approx(expected.value + 1.4, rel=1e-4)
    model.layers[-1].trainable = False
    (frozen,) = hessian_traces(model, kernels(model), batches, **settings).values()
    assert frozen.value == pytest.approx(expected.value, rel=1e-4)
    assert not model.layers[-1].trainable


def test_losses_of_activities_count(regression):
    x, y = regression
    model = linear(x, use_bias=False, activity_regularizer=keras.regularizers.L2(0.6))
    traces = unsampled_traces(model, kernels(model), [([x], y, None)])
    check(traces, {"dense": (2 / 3 + 2 * 0.6) * np.mean(x**2)})


def test_several_inputs_outputs_and_weighted_losses(regression):
    x, y = regression
    a, b = keras.Input((5,), name="a"), keras.Input((5,), name="b")
    outputs = {
        "one": layers.Dense(3, use_bias=False, name="one")(a),
        "two": layers.Dense(3, use_bias=False, name="two")(b),
    }
    model = models.randomize(keras.Model({"b": b, "a": a}, outputs))
    losses = {"one": "mse", "two": keras.losses.MeanSquaredError()}
    compiled(model, losses, loss_weights={"one": 4.0, "two": 0.5})
    targets = {"one": y, "two": 2 * y}
    edges = keras.tree.flatten(model.input)
    batches = labelled_batches(({"a": x, "b": 3 * x}, targets), edges, 9)
    traces = unsampled_traces(model, kernels(model), batches)
    square = 2 / 3 * np.mean(x**2)
    check(traces, {"one": 4 * square, "two": 0.5 * 9 * square})


@keras.saving.register_keras_serializable("keras_compress_tests")
class Sum(keras.Model):
    """A subclassed model with two inputs, no `training`, and a loss without it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left = layers.Dense(3, use_bias=False, name="left")
        self.right = layers.Dense(3, use_bias=False, name="right")

    def call(self, pair):
        return self.left(pair["left"]) + self.right(pair["right"])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 5 * super().compute_loss(x, y, y_pred, sample_weight)


def test_a_subclassed_model(regression):
    x, y = regression
    model = Sum()
    model({"left": x, "right": x})
    compiled(model, "mse")
    variables = {layer: layer.kernel for layer in (model.left, model.right)}
    inputs = [x, np.float32(2) * x]
    batches = [([array[:30] for array in inputs], y[:30], None)]
    batches += [([array[30:] for array in inputs], y[30:], None)]
    traces = unsampled_traces(model, variables, batches)
    square = 5 * 2 / 3 * np.mean(x**2)
    check(traces, {model.left: square, model.right: 4 * square})


def test_a_sequential_model_and_an_embedding():
    """The Hessian of a table is that of its rows, each met as often as its index."""
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 2, name="e")])
    compiled(models.randomize(model), "mse")
    x = np.array([[0, 1, 1], [2, 2, 2]], "int32")
    table = {"table": model.layers[0].embeddings}
    batch = ([x], np.zeros((2, 3, 2), "float32"), None)
    (trace,) = hessian_traces(model, table, [batch], iterations=2).values()
    assert trace.value == pytest.approx(2 / 12 * 6 / 5, rel=1e-5)


# Full Hessians


@pytest.fixture(scope="module")
def reference():
    """A small network's kernels' true traces, in inference mode, with frozen layers among them."""
    keras.utils.set_random_seed(0)
    model = classifier()
    batches = random_batches((6, 6, 2), 3)
    return full_traces(model, kernels(model), batches), batches


def test_estimates_agree_with_the_full_hessian(reference):
    expected, batches = reference
    model = classifier()
    model.get_layer("conv").trainable = False
    check(unsampled_traces(model, kernels(model), batches), expected)
    traces = hessian_traces(model, kernels(model), batches, iterations=400, tolerance=0)
    check_sampled(traces, expected)
    assert all(trace.exact for trace in traces.values())


def test_other_kinds_of_layers_agree_with_the_full_hessian():
    inputs = keras.Input((6, 4), name="series")
    x = layers.LayerNormalization(name="norm")(inputs)
    x = layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = layers.LSTM(2, name="lstm")(x)
    model = compiled(models.randomize(keras.Model(inputs, layers.Dense(2, name="head")(x))))
    variables = {v.path: v for v in model.trainable_variables if v.path.endswith("/kernel")}
    batches = random_batches((6, 4), 2, sizes=(6,))
    expected = full_traces(model, variables, batches)
    traces = unsampled_traces(model, variables, batches)
    assert len(traces) == 6
    check(traces, expected, rel=5e-3)
    # torch cannot differentiate its attention twice.
    assert {trace.exact for trace in traces.values()} == {BACKEND != "torch"}


def test_the_order_of_layers_does_not_depend_on_the_seed(reference):
    expected, batches = reference
    model = classifier()
    ranking = sorted(expected, key=expected.get)
    for seed in range(3):
        traces = hessian_traces(model, kernels(model), batches, 200, 0, seed)
        assert sorted(traces, key=lambda name, found=traces: found[name].value) == ranking


def test_the_seed_decides_everything():
    model = classifier()
    batches = random_batches((6, 6, 2), 3)
    first, again, other = (
        hessian_traces(model, kernels(model), batches, 3, seed=seed) for seed in (7, 7, 8)
    )
    assert {k: t.value for k, t in first.items()} == pytest.approx(
        {k: t.value for k, t in again.items()}, rel=1e-6
    )
    assert all(abs(first[key].value / other[key].value - 1) > 1e-3 for key in first)


def test_vectors_are_signs_and_the_same_everywhere():
    vector = hessian._signs(np.random.default_rng(0), (4, 2))
    assert vector.dtype == "float32"
    np.testing.assert_array_equal(vector.ravel(), [-1, 1, 1, 1, 1, 1, -1, 1])
    many = hessian._signs(np.random.default_rng(1), (100, 100))
    assert set(np.unique(many)) == {-1.0, 1.0} and abs(many.mean()) < 0.03


def test_a_shared_variable_under_two_keys(regression):
    x, y = regression
    model = linear(x)
    kernel = model.layers[-1].kernel
    traces = hessian_traces(model, {1: kernel, 2: kernel}, [([x], y, None)], 4)
    assert traces[1] == traces[2] and traces[1].value > 0


# Differences of gradients


@pytest.fixture
def without_second_derivatives(monkeypatch):
    def refuse(*arguments):
        raise LookupError("gradient registry has no entry for: SomeGrad")

    monkeypatch.setattr(hessian, "_hessian_product", refuse)


def test_differences_agree_with_derivatives(without_second_derivatives, monkeypatch, caplog):
    model = classifier()
    batches = random_batches((6, 6, 2), 3)
    with caplog.at_level(logging.WARNING, "keras_compress"):
        by_differences = hessian_traces(model, kernels(model), batches, 10)
    (record,) = caplog.records
    assert "cannot be differentiated twice" in record.message
    assert "LookupError: gradient registry has no entry for: SomeGrad" in record.message
    monkeypatch.undo()
    exact = hessian_traces(model, kernels(model), batches, 10)
    for name, trace in exact.items():
        assert trace.exact and not by_differences[name].exact
        assert by_differences[name].value == pytest.approx(trace.value, rel=0.01)
        assert by_differences[name].error == pytest.approx(trace.error, rel=0.01)


def test_differences_of_weights_that_are_zero(without_second_derivatives, regression):
    x, y = regression
    model = linear(x, use_bias=False)
    model.layers[-1].kernel.assign(np.zeros((5, 3)))
    traces = unsampled_traces(model, kernels(model), [([x], y, None)])
    check(traces, {"dense": 2 / 3 * np.mean(x**2)})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a gradient of TensorFlow without its own")
def test_an_operation_without_a_second_derivative(caplog):
    """TensorFlow can differentiate the resizing of images once only."""
    import tensorflow as tf

    @tf.custom_gradient
    def once(x):
        def gradient(upstream):
            return tf.raw_ops.ResizeBicubicGrad(
                grads=upstream, original_image=x, align_corners=False
            )

        return tf.raw_ops.ResizeBicubic(images=x, size=[3, 3]), gradient

    inputs = keras.Input((6, 6, 2))
    x = ops.tanh(layers.Conv2D(2, 3, name="conv")(inputs))
    x = layers.Flatten()(layers.Lambda(once, output_shape=(3, 3, 2))(x))
    model = compiled(models.randomize(keras.Model(inputs, layers.Dense(3, name="head")(x))))
    batches = random_batches((6, 6, 2), 3)
    before = [numpy(v).copy() for v in model.variables]
    traces = unsampled_traces(model, kernels(model), batches)
    assert "ResizeBicubicGrad" in caplog.text
    assert not any(trace.exact for trace in traces.values())
    check(traces, full_traces(model, kernels(model), batches), rel=0.02)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


# What must not change, and when it ends


def test_the_model_is_left_as_it_was():
    model = classifier(kernel_regularizer="l2")
    model.get_layer("hidden").trainable = False
    compiled(model, metrics=["accuracy"])
    x, y = random_batches((6, 6, 2), 3, sizes=(16,))[0][:2]
    model.fit(x[0], y, batch_size=8, verbose=0)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [numpy(v).copy() for v in variables]
    trainable = [v.path for v in model.trainable_variables]
    expected = model.get_metrics_result()
    batches = random_batches((6, 6, 2), 3)
    traces = hessian_traces(model, kernels(model), batches, 2)
    assert set(traces) == {"conv", "hidden", "head"}
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value, err_msg=variable.path)
    assert [v.path for v in model.trainable_variables] == trainable
    assert model.get_metrics_result() == expected
    model.fit(x[0], y, batch_size=8, verbose=0)  # and it goes on training


def test_the_model_is_left_as_it_was_after_an_error():
    model = classifier()
    before = [numpy(v).copy() for v in model.variables]

    def stop(draw, total):
        raise KeyError(draw)

    with pytest.raises(KeyError):
        hessian_traces(model, kernels(model), random_batches((6, 6, 2), 3), report=stop)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


def test_the_loss_is_compiled_once_per_shape_of_batch(monkeypatch):
    if BACKEND == "torch":
        pytest.skip("torch compiles nothing here")
    traced = []
    call = hessian._Loss.__call__
    monkeypatch.setattr(
        hessian._Loss,
        "__call__",
        lambda *args, **named: (traced.append(1), call(*args, **named))[1],
    )
    batches = random_batches((6, 6, 2), 3, sizes=(8, 8, 8, 5))
    model = classifier()
    hessian_traces(model, kernels(model), batches, 5, tolerance=0)
    assert len(traced) == 4 + 2  # once per batch, to see that it is finite; once per shape


def test_eager_models_stay_eager():
    """Python code in a loss sees values, when it is compiled so."""
    seen = []

    def loss(target, output):
        seen.append(float(ops.convert_to_numpy(ops.stop_gradient(ops.sum(output)))))
        return ops.mean(ops.square(output - target), axis=-1)

    if BACKEND == "jax":
        pytest.skip("JAX differentiates what it traces")
    x = np.ones((4, 2), "float32")
    model = compiled(linear(x), loss, run_eagerly=True)
    hessian_traces(model, kernels(model), [([x], np.zeros((4, 3), "float32"), None)], 3)
    assert len(seen) == 4


def test_draws_stop_when_the_total_is_steady():
    model = classifier()
    batches = random_batches((6, 6, 2), 3)
    totals = []
    traces = hessian_traces(
        model,
        kernels(model),
        batches,
        iterations=500,
        tolerance=5e-3,
        report=lambda draw, total: totals.append((draw, total)),
    )
    draws = [draw for draw, _ in totals]
    values = np.array([total for _, total in totals])
    assert draws == list(range(1, len(totals) + 1)) and 10 <= len(totals) < 500
    assert {trace.draws for trace in traces.values()} == {len(totals)}
    assert values[-1] == pytest.approx(sum(trace.value for trace in traces.values()))
    changes = np.abs(np.diff(values)) / (np.abs(values[:-1]) + 1e-6) < 5e-3
    assert changes[-3:].all()
    ends = [k for k in range(10, len(values)) if changes[k - 4 : k - 1].all()]
    assert not ends


@pytest.mark.parametrize(
    ("totals", "steady"),
    [
        ([], False),
        ([1.0] * 9, False),
        ([1.0] * 10, True),
        ([0.0] * 10, True),
        ([1.0] * 8 + [1.2, 1.2], False),
        ([1.0] * 8 + [1.2] * 3, False),
        ([1.0] * 8 + [1.2] * 4, True),
        ([-1.0] * 8 + [-1.2, -1.2005, -1.2, -1.2005], True),
    ],
)
def test_three_small_changes_in_a_row(totals, steady):
    assert hessian._is_steady(totals, 1e-3) is steady
    assert not hessian._is_steady(totals, 0)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("by", ["derivatives", "differences"])
def test_mixed_precision(policy, by, regression, request):
    if by == "differences":
        request.getfixturevalue("without_second_derivatives")
    keras.config.set_dtype_policy(policy)
    x, y = regression
    model = linear(x, use_bias=False)
    (trace,) = hessian_traces(model, kernels(model), [([x], y, None)], 50, 0).values()
    assert isinstance(trace.value, float)
    assert trace.value == pytest.approx(2 / 3 * np.mean(x**2), rel=0.15)


# Errors


def some(regression, **changed):
    x, y = regression
    model = linear(x)
    arguments = {"model": model, "variables": kernels(model), "batches": [([x], y, None)]}
    return arguments | changed


def test_a_model_without_a_loss(regression):
    uncompiled = models.randomize(keras.Sequential([keras.Input((5,)), layers.Dense(3)], name="m"))
    with pytest.raises(ValueError, match="compiled with a loss.*Received: model 'm' without"):
        hessian_traces(**some(regression, model=uncompiled))
    uncompiled.compile("sgd")
    with pytest.raises(ValueError, match="compiled with a loss.*Received: model 'm' without"):
        hessian_traces(**some(regression, model=uncompiled))


@pytest.mark.parametrize(
    ("name", "value", "received"),
    [("batches", [], 0), ("variables", {}, 0), ("iterations", 0, 0), ("iterations", -3, -3)],
)
def test_numbers_below_one(regression, name, value, received):
    message = f"Expected one at least of `{name}`. Received: {received}"
    with pytest.raises(ValueError, match=message):
        hessian_traces(**some(regression, **{name: value}))


def test_variables_that_are_not_the_models(regression):
    other = linear(regression[0])
    with pytest.raises(
        ValueError, match="float variables of model .*Received: 'dense/kernel' for key 'dense'"
    ):
        hessian_traces(**some(regression, variables=kernels(other)))
    with pytest.raises(ValueError, match="Received: 'no variable' for key 'x'"):
        hessian_traces(**some(regression, variables={"x": "no variable"}))
    model = classifier()
    seed = {"seed": next(v for v in model.variables if "seed" in v.path)}
    with pytest.raises(ValueError, match="float variables of model 'small'. .*for key 'seed'"):
        hessian_traces(model, seed, random_batches((6, 6, 2), 3))


def test_losses_that_are_not_finite(regression):
    x, y = regression
    bad = y.copy()
    bad[0, 0] = np.inf
    with pytest.raises(ValueError, match="finite loss on every batch. Received: inf on batch 1"):
        hessian_traces(**some(regression, batches=[([x], y, None), ([x], bad, None)]))


def test_derivatives_that_are_not_finite(regression):
    """The square root has no derivatives at zero."""
    x = np.zeros((4, 5), "float32")
    model = compiled(linear(x), lambda target, output: ops.sqrt(ops.abs(output[:, 0])))
    model.layers[-1].bias.assign(np.zeros(3))
    batches = [([x], np.zeros((4, 3), "float32"), None)]
    with pytest.raises(ValueError, match=r"finite second .*in draw 1 for \['dense/kernel'\]"):
        hessian_traces(model, kernels(model), batches)
