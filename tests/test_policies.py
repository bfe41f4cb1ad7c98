"""Compilers, dtype policies and options of optimizers: what they must not change."""

import functools

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, benchmark_module, numpy, one_step_per_execution
from policy_helpers import (
    BATCH,
    CASES,
    MAGNITUDE,
    PRUNING,
    QUANTIZATION,
    STAGED,
    STEPS,
    X,
    Y,
    compressed,
    counted_loss,
    fitted,
    network,
    state_of,
)

import keras_compress as kc
from keras_compress.model_facts import transforms_of
from keras_compress.training.compiled import batches_done, built_optimizer
from keras_compress.training.learning_rate import LearningRate
from keras_compress.training.one_training import OneTraining

WAYS = {
    "graph": {"jit_compile": False},
    "compiled": {"jit_compile": True},
    "auto": {"jit_compile": "auto"},
    "groups": {"jit_compile": BACKEND == "jax", "steps_per_execution": 4},
}
traced = pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch runs every step eagerly")
HALF = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
every_mixed_policy = pytest.mark.parametrize("policy", HALF)


@functools.cache
def trained(case, way):
    """Return what `fitted` does, of one of the cases trained in one way: eagerly or compiled."""
    keras.utils.set_random_seed(0)
    arguments = {"run_eagerly": True} if way == "eager" else WAYS[way]
    return fitted(compressed(*CASES[case]), **arguments)


def assert_same_states(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[index], theirs[index]) for index in ours)


@traced
@pytest.mark.parametrize(
    "case, way",
    [("grids", "compiled"), ("signs", "compiled"), *((case, "groups") for case in CASES)],
)
def test_masks_and_levels_never_retrace(case, way):
    """The loss is Python, so it is called while a step is traced, and not when it runs."""
    run = trained(case, way)
    changes = [
        any(not np.array_equal(before[i], after[i]) for i in before)
        for before, after in zip(run.states, run.states[1:], strict=False)
    ]
    assert sum(changes) >= 2
    assert run.traces[0] < STEPS
    assert set(run.traces) == {run.traces[0]}


@traced
def test_traced_once_more_after_ranges_were_read():
    model = compressed(
        QUANTIZATION | {"initializer": {"range": {"num_init_samples": 2 * BATCH}}}, data=None
    )
    run = fitted(model, epochs=3)
    assert run.traces[0] <= 1 + 2 + 1  # symbolically, two eager steps, the compiled one
    assert set(run.traces) == {run.traces[0]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["grids", "signs"])
def test_compiled_or_not_the_training_is_the_same(case, way):
    if BACKEND == "torch" and way in ("compiled", "groups"):
        pytest.skip("Keras on torch: no XLA, and one step per execution")
    if BACKEND == "jax" and way == "graph":
        pytest.skip("on JAX, a step that is not compiled is the eager one")
    if case == "signs" and way == "auto":
        pytest.skip("it is one of the other ways, as the other case shows")
    expected, actual = trained(case, "eager"), trained(case, way)
    assert_same_states(actual.states, expected.states)
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-3)


@one_step_per_execution
def test_random_masks_do_not_depend_on_the_group():
    """Compiled by XLA, TensorFlow draws other numbers: that is compared nowhere."""
    expected = trained("drawn", "compiled" if BACKEND == "jax" else "graph")
    actual = trained("drawn", "groups")
    assert_same_states(actual.states, expected.states)
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-3)


@every_mixed_policy
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_activations_lie_on_the_grid_of_float32(policy, mode):
    """The grid is computed here in NumPy, from the range; rounding to half precision comes last."""
    keras.config.set_dtype_policy(policy)
    model = compressed(QUANTIZATION | {"activations": {"mode": mode}})
    names = ["image-fake_quantize", "relu-fake_quantize"]
    for name, dtype in zip(names, ["float32", HALF[policy]], strict=True):
        layer = next(each for each in model.layers if each.name == name)
        values = keras.ops.cast(3 * X[:4], dtype)
        outputs = layer(values)
        assert keras.backend.standardize_dtype(outputs.dtype) == dtype
        low, high = layer.quantizer.effective_range()
        step = (high - low) / (layer.quantizer.levels - 1)
        codes = np.round((np.clip(numpy(keras.ops.cast(values, "float32")), low, high)) / step)
        expected = keras.ops.cast(keras.ops.cast(codes * step, "float32"), dtype)
        actual, expected = (numpy(keras.ops.cast(y, "float32")) for y in (outputs, expected))
        resolution = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        np.testing.assert_allclose(actual, expected, rtol=resolution)
        assert np.mean(actual == expected) > (0 if dtype == "float32" else 0.95)


@pytest.mark.parametrize("policy", [*HALF, "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_masks_and_ranges_are_held_in_float32(policy, case):
    """Also where the policy is that of single layers, with weights in half precision too."""
    model = compressed(*CASES[case], model=network(dtype=policy))
    transforms = transforms_of(model)
    held = {keras.backend.standardize_dtype(v.dtype) for t in transforms for v in t.weights}
    assert held <= {"float32", "bool"}
    assert {transform.compute_dtype for transform in transforms} == {"float32"}
    first = model.get_layer("first")
    assert first.dtype_policy.name == policy
    raw = keras.backend.standardize_dtype(first.raw_weight("kernel").dtype)
    assert raw == ("float32" if policy in HALF else policy)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_a_layer_with_its_own_policy_is_trained(policy):
    run = fitted(compressed(PRUNING, MAGNITUDE, QUANTIZATION, model=network(dtype=policy)))
    assert np.isfinite(run.loss).all()
    second = run.model.get_layer("second")
    effective = second.effective_weight("kernel")
    channels, single = (second.transforms_of("kernel")[i] for i in (0, 1))
    assert not effective[~single.mask_values()].any()
    assert not effective[..., channels.mask(-1) == 0].any()
    assert single.sparsity > 0.3


def ranges_after_a_step(initial_scale):
    """Return (before, after) of all range variables, where the loss is scaled by this factor."""
    keras.utils.set_random_seed(0)
    model = compressed(QUANTIZATION)
    variables = [v for quantizer in model.quantizers() for v in quantizer.range_variables]
    before = [numpy(v).copy() for v in variables]
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale)
    model.compile(optimizer, counted_loss()[0])
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    assert int(numpy(model.optimizer.iterations)) == 1
    return before, [numpy(v).copy() for v in variables]


def test_scaling_the_loss_leaves_gradients_of_ranges_alone():
    """Ranges move as far as they do unscaled: powers of two leave the digits as they are."""
    keras.config.set_dtype_policy("mixed_float16")
    before, plain = ranges_after_a_step(1.0)
    _, scaled = ranges_after_a_step(2.0**12)
    moved = [after - first for first, after in zip(before, plain, strict=True)]
    assert all(np.isfinite(each).all() for each in scaled)
    assert sum(bool(each.any()) for each in moved) >= len(moved) - 1  # that of the input is fixed
    for first, step, after in zip(before, moved, scaled, strict=True):
        np.testing.assert_allclose(after - first, step, rtol=1e-2, atol=1e-3 * abs(step).max())


class Levels(keras.callbacks.Callback):
    """Notes the sparsity in which every batch was trained."""

    def __init__(self):
        super().__init__()
        self.seen, self.done = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.model.config.algorithms[0].sparsity(self.model))
        self.done.append(batches_done(self.model.optimizer))


def levels(optimizer, epochs=4, data=None, weights=None, **params):
    """Return the sparsity after every batch of a training."""
    noted = Levels()
    algorithm = MAGNITUDE | {"params": MAGNITUDE["params"] | params}
    model = compressed(algorithm)
    if data is None:
        fitted(model, optimizer, epochs, weights, [noted])
    else:
        model.compile(optimizer, counted_loss()[0])
        callbacks = [kc.callbacks.Compress(), noted]
        model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)
    return noted


@pytest.mark.parametrize("accumulated", [None, 4, 8])
def test_epochs_are_counted_in_batches_whatever_an_update_takes(accumulated):
    """0.2 more in every epoch of six batches, also where an update takes more than an epoch."""
    rate = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated)
    expected = np.repeat([0.0, 0.2, 0.4, 0.6], STEPS)
    np.testing.assert_allclose(levels(rate).seen, expected, atol=0.01)


def test_levels_per_step_follow_the_updates_of_accumulated_gradients():
    """A thirtieth per batch, taken in twos: the level stays within an update."""
    rate = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    noted = levels(rate, epochs=3, update_per_optimizer_step=True)
    batches = np.arange(1, 3 * STEPS + 1)
    # Notes are taken behind `Compress`, which has made the next step's level by then.
    np.testing.assert_allclose(noted.seen, batches // 2 * 2 / 30, atol=0.01)


def test_accumulated_gradients_are_those_of_a_larger_batch():
    """Weights and ranges alike, as batch normalization is left out."""
    results = []
    for batch, accumulated in ((2 * BATCH, None), (BATCH, 2)):
        keras.utils.set_random_seed(0)
        model = compressed(QUANTIZATION, model=network(norm=False))
        optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulated)
        model.compile(optimizer, counted_loss()[0])
        callbacks = [kc.callbacks.Compress()]
        model.fit(X, Y, batch, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        results.append([numpy(variable).copy() for variable in model.trainable_variables])
    for large, small in zip(*results, strict=True):
        np.testing.assert_allclose(small, large, atol=1e-5)


def thrown_away(*batches):
    """Return weights of samples that make the gradients of some batches infinite."""
    weights = np.ones(len(X), "float32")
    for batch in batches:
        weights[batch * BATCH : (batch + 1) * BATCH] = np.inf
    return weights


def scaled_optimizer():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), 4.0)


def test_batches_that_loss_scaling_throws_away_do_not_count():
    """One in each epoch: a new one begins a batch later each time, and none is left out."""
    noted = levels(scaled_optimizer(), weights=thrown_away(1))
    taken = np.concatenate([[0], noted.done[:-1]])  # when each batch began
    assert noted.done == [batch - batch // STEPS - (batch % STEPS >= 1) + 1 for batch in range(24)]
    np.testing.assert_allclose(noted.seen, 0.2 * (taken // STEPS), atol=0.01)


def data_of_unknown_length(weights):
    import tensorflow as tf

    def batches():
        for start in range(0, len(X), BATCH):
            part = slice(start, start + BATCH)
            yield X[part], Y[part], weights[part]

    specs = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in (X, Y, weights)]
    return tf.data.Dataset.from_generator(batches, output_signature=tuple(specs))


# Keras warns in the first epoch, from which it learns the length.
learns_length = pytest.mark.filterwarnings("ignore:Your input ran out of data")


@learns_length
def test_an_epoch_of_unknown_length_has_the_batches_that_were_thrown_away():
    noted = levels(scaled_optimizer(), data=data_of_unknown_length(thrown_away(0, 3)))
    assert noted.done[-1] == 4 * (STEPS - 2)
    taken = np.concatenate([[0], noted.done[:-1]])
    np.testing.assert_allclose(noted.seen, 0.2 * (taken // STEPS), atol=0.01)


@learns_length
@pytest.mark.parametrize("accumulated, thrown", [(4, ()), (None, (0, 3))])
def test_accuracy_aware_training_measures_an_epoch_in_batches(accumulated, thrown):
    model = compressed(QUANTIZATION)
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 4.0)
    model.compile(optimizer, counted_loss()[0])
    callbacks = [kc.callbacks.Compress()]
    training = OneTraining(callbacks, model, 2, None, LearningRate(model.optimizer))
    training.begin()
    data = data_of_unknown_length(thrown_away(*thrown))
    model.fit(data, epochs=1, verbose=0, callbacks=training)
    assert training.steps == STEPS
    assert batches_done(model.optimizer) == STEPS - len(thrown)


class Trained(keras.callbacks.Callback):
    """Notes the values of all trained variables after every batch."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append([numpy(v).copy() for v in self.model.trainable_variables])


def test_averaged_weights_and_ranges():
    """In the end every trained variable is its average, by the formula; masks have no part."""
    noted = Trained()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.75)
    run = fitted(compressed(PRUNING, MAGNITUDE, QUANTIZATION), optimizer, 2, more=[noted])
    averages = noted.values[0]
    for values in noted.values[1:]:
        pairs = zip(averages, values, strict=True)
        averages = [0.75 * average + 0.25 * value for average, value in pairs]
    model = run.model
    for variable, expected, last in zip(
        model.trainable_variables, averages, noted.values[-1], strict=True
    ):
        np.testing.assert_allclose(numpy(variable), expected, rtol=1e-4, atol=1e-6)
        assert variable.name != "scale" or numpy(variable).shape == last.shape
    assert any(abs(a - b).max() > 1e-4 for a, b in zip(averages, noted.values[-1], strict=True))
    assert_same_states([state_of(model)], run.states[-1:])


def test_taylor_scores_beside_averages():
    taylor = PRUNING | {"params": PRUNING["params"] | {"filter_importance": "taylor"}}
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    if BACKEND == "tensorflow":
        model = compressed(taylor)
        with pytest.raises(ValueError, match="scored by `taylor`.*Received: use_ema=True. Choose"):
            fitted(model, optimizer, 2)
        assert batches_done(optimizer) == 0
    else:
        assert np.isfinite(fitted(compressed(taylor), optimizer, 2).loss).all()


def test_clipped_gradients_of_ranges():
    """No range moves further than rate times norm; without clipping some would."""
    moves = []
    for norm in (None, 1e-3):
        model = compressed(QUANTIZATION)
        variables = [v for q in model.quantizers() for v in q.range_variables]
        before = [numpy(v).copy() for v in variables]
        fitted(model, keras.optimizers.SGD(1.0, clipnorm=norm), 1)
        pairs = zip(variables, before, strict=True)
        moves.append(max(float(np.linalg.norm(numpy(v) - first)) for v, first in pairs))
    assert moves[1] <= 1.01e-3 * STEPS < moves[0]


def float32_twin(model, *algorithms):
    """Return a model of the float32 policy that holds what a trained one does."""
    keras.config.set_dtype_policy("float32")
    twin = compressed(*algorithms)
    assert {variable.dtype for variable in model.weights} <= {"float32", "bool"}
    twin.set_weights(model.get_weights())
    for ours, theirs in zip(twin.quantizers(), model.quantizers(), strict=True):
        ours.signed = theirs.signed
    return twin


@every_mixed_policy
def test_the_export_is_the_evaluation_in_float32(policy, tmp_path):
    """A grid is met by the same numbers, so nothing is left but the order of float32 sums."""
    if BACKEND != "tensorflow":
        pytest.skip("the child process that exports from other backends has its own tests")
    import openvino as ov

    from keras_compress.export.verify import compile_on_cpu

    algorithms = (PRUNING, MAGNITUDE, QUANTIZATION)
    keras.config.set_dtype_policy(policy)
    model = fitted(compressed(*algorithms)).model
    kc.export(model, tmp_path / "net.xml", verify=False)
    received = compile_on_cpu(ov.Core(), tmp_path / "net.xml")(X)[0]
    expected = float32_twin(model, *algorithms).predict(X, verbose=0)
    assert abs(received - expected).max() <= 1e-3 * np.ptp(expected)
    trained_output = model.predict(X, verbose=0)  # in half precision: as near as that is
    assert abs(received - trained_output).max() <= 0.05 * np.ptp(expected)


@every_mixed_policy
def test_files_keep_the_policies_of_layers(policy, tmp_path):
    model = fitted(compressed(PRUNING, STAGED, model=network(dtype=policy)), epochs=3).model
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras", compile=False)
    for ours, theirs in zip(loaded.layers, model.layers, strict=True):
        assert ours.dtype_policy.name == theirs.dtype_policy.name
    assert {t.compute_dtype for t in transforms_of(loaded)} == {"float32"}
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), expected)
    assert_same_states([state_of(loaded)], [state_of(model)])
    plain = kc.strip(loaded)
    assert plain.get_layer("second").dtype_policy.name == policy


def test_a_file_keeps_a_loss_scaling_optimizer(tmp_path):
    """One that was given to `compile`: its scale and its clock go on."""
    model = compressed(PRUNING, QUANTIZATION)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(2e-3), 2.0**10)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(
        X,
        Y,
        BATCH,
        epochs=2,
        sample_weight=thrown_away(2),
        verbose=0,
        shuffle=False,
        callbacks=[kc.callbacks.Compress()],
    )
    model.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras").optimizer
    assert type(loaded) is keras.optimizers.LossScaleOptimizer
    assert float(numpy(loaded.dynamic_scale)) == 2.0**8
    assert batches_done(loaded) == batches_done(model.optimizer) == 2 * (STEPS - 1)


def test_the_policy_of_a_model_is_kept_under_another_global_one(tmp_path):
    """It decides whether `compile` scales the loss."""
    keras.config.set_dtype_policy("mixed_float16")
    model = network()
    keras.config.set_dtype_policy("float32")
    model = compressed(PRUNING, QUANTIZATION, model=model)
    model.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    for each in (model, loaded, kc.shrink(model)):
        assert each.dtype_policy.name == "mixed_float16"
        each.compile("sgd", "mse")
        assert type(each.optimizer) is keras.optimizers.LossScaleOptimizer


@pytest.mark.parametrize("wrapped", [False, True])
def test_shrinking_cuts_averages_and_accumulated_gradients(wrapped):
    """Training goes on in the smaller model with the optimizer's options as they were."""
    optimizer = keras.optimizers.Adam(2e-3, use_ema=True, gradient_accumulation_steps=4)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 16.0)
    model = compressed(PRUNING | {"params": PRUNING["params"] | {"schedule": "baseline"}})
    model.compile(optimizer, counted_loss()[0])
    for start in (0, BATCH):
        model.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
    small, copy = kc.shrink(model, optimizer=model.optimizer)
    assert small.count_params() < model.count_params()
    assert batches_done(copy) == batches_done(model.optimizer) == 2
    small.compile(copy, counted_loss()[0])
    for start in (2 * BATCH, 3 * BATCH):
        for each in (model, small):
            each.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
    assert batches_done(copy) == 4 and int(numpy(copy.iterations)) == 1
    expected, actual = (each.predict(X, verbose=0) for each in (model, small))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_made_smaller_within_fit_where_losses_are_scaled():
    """The scale goes on: batches thrown away before and after have halved it."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(2e-3), 2.0**10)
    model = compressed(PRUNING | {"params": PRUNING["params"] | {"pruning_steps": 1}})
    before = model.count_params()
    model.compile(optimizer, counted_loss()[0])
    callbacks = [kc.callbacks.Compress(shrink=True)]
    arguments = {"sample_weight": thrown_away(2), "verbose": 0, "shuffle": False}
    model.fit(X, Y, BATCH, epochs=4, callbacks=callbacks, **arguments)
    assert model.count_params() < before
    assert float(numpy(model.optimizer.dynamic_scale)) == 2.0**6
    assert batches_done(model.optimizer) == 4 * (STEPS - 1)


def test_an_optimizer_is_built_once():
    model = compressed(QUANTIZATION)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), 2.0**10)
    model.compile(optimizer, counted_loss()[0])
    assert built_optimizer(model) is model.optimizer
    optimizer.dynamic_scale.assign(8.0)
    count = len(optimizer.variables)
    assert built_optimizer(model) is optimizer and len(optimizer.variables) == count
    assert float(numpy(optimizer.dynamic_scale)) == 8.0


@pytest.mark.slow
def test_digits_lose_less_than_a_point():
    """A short version of the benchmark, which shows all of them."""
    if BACKEND != "tensorflow":
        pytest.skip("the child process that exports from other backends has its own tests")
    names = ("float32", "mixed_bfloat16, XLA")
    policies = benchmark_module("policies")
    results = policies.compare(names, epochs=5, pretraining=5)
    plain, half = (results[name] for name in names)
    assert plain.deployed > 0.95
    assert half.deployed >= plain.deployed - policies.ALLOWED
    assert half.difference <= 0.02
