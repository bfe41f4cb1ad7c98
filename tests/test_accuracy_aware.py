"""Accuracy-aware training of small networks, what callbacks see of it, and its errors."""

import contextlib
import io
import logging

import keras
import numpy as np
import pytest
from accuracy_helpers import (
    MAGNITUDE,
    PRUNING,
    QUANTIZATION,
    compressed,
    config,
    data,
    fitted,
    same,
    trained,
    weights,
)
from backend_helpers import numpy

import keras_compress as kc
from keras_compress.accuracy_aware_fit import accuracy_aware_fit
from keras_compress.plots import draw_accuracy
from keras_compress.training.learning_rate import LearningRate, ScaledSchedule
from keras_compress.training.one_training import judged, steps_in_epoch


@pytest.fixture(scope="module")
def original():
    return trained()


class Calls(keras.callbacks.Callback):
    """Notes what it is told, and the learning rate that it sees."""

    def __init__(self):
        super().__init__()
        self.calls, self.rates = [], []

    def on_train_begin(self, logs=None):
        self.calls.append("begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(epoch)
        self.rates.append(float(numpy(self.model.optimizer.learning_rate)))

    def on_train_end(self, logs=None):
        self.calls.append("end")
        self.last = logs


class Metric(keras.callbacks.Callback):
    """Logs a value that depends on the rate of the model's first algorithm alone."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_epoch_end(self, epoch, logs=None):
        logs["fake"] = self.value(self.model.config.algorithms[0].rate(self.model))


def driven(model, value, **arguments):
    """Train by a metric that is a function of the rate."""
    callbacks = [Metric(value), *arguments.pop("callbacks", ())]
    return fitted(model, metric="fake", callbacks=callbacks, **arguments)


# Real training


@pytest.mark.parametrize("algorithms", [(PRUNING, QUANTIZATION), (MAGNITUDE,)])
def test_the_model_holds_the_highest_rate_within_the_bound(algorithms, original, caplog):
    model = compressed(original, *algorithms, maximal_total_epochs=7)
    before = weights(original)
    with caplog.at_level(logging.WARNING):
        result = fitted(model, baseline=original)
    judgement = original.evaluate(*data(32, 1), verbose=0, return_dict=True)
    assert result.baseline == pytest.approx(judgement["accuracy"], abs=1e-6)
    assert result.bound == pytest.approx(result.baseline - 0.05, abs=1e-6)
    within = [each for each in result.epochs if each.value >= result.bound - 1e-6]
    assert [each.within for each in result.epochs] == [each in within for each in result.epochs]
    assert within and result.reached and not caplog.records
    assert result.rate == max(each.rate for each in within) > 0
    best = [each.value for each in within if each.rate == result.rate]
    assert result.value == max(best)
    again = model.evaluate(*data(32, 1), verbose=0, return_dict=True)
    assert again["accuracy"] == pytest.approx(result.value, abs=1e-6)
    assert model.config.algorithms[0].rate(model) == result.rate
    assert model.config.algorithms[0].masks_are_final(model)
    assert result.history["val_accuracy"] == [each.value for each in result.epochs]
    assert result.history["loss"] == [each.loss for each in result.epochs]
    assert same(before, weights(original))


def test_the_rate_is_where_the_metric_puts_it(original):
    """The metric is within its bound up to a sparsity of 0.47."""
    found = []
    for name, lower in (("max", False), ("min", True)):
        model = compressed(original, MAGNITUDE, maximal_total_epochs=20)
        bad = 2.0 if lower else 0.0
        result = driven(model, lambda rate, bad=bad: 1.0 if rate <= 0.47 else bad, mode=name)
        found.append([each.rate for each in result.epochs])
        assert result.rate == pytest.approx(0.45) and result.reached
        assert model.config.algorithms[0].sparsity(model) == pytest.approx(0.45, abs=0.01)
        assert result.stopped == "the step fell below 0.025"
        final = result.epochs[result.epoch]
    # The schedule first; up; half a step back; a quarter further; the bound is met by 0.45.
    assert found[0] == pytest.approx([0, 0.3, 0.4, 0.5, 0.45, 0.475]) and found[0] == found[1]
    # Learning rates: as it was; halved after 0.5 failed; quartered after 0.45 held.
    rates = [each.learning_rate for each in result.epochs]
    assert rates == pytest.approx([0.01] * 4 + [0.005, 0.0025], rel=1e-5)
    assert final.learning_rate == pytest.approx(float(numpy(model.optimizer.learning_rate)))


def test_a_schedule_of_the_learning_rate_is_scaled(original):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 10, 0.9)
    model = compressed(original, MAGNITUDE, learning_rate=schedule, eager=False)
    result = driven(model, lambda rate: 1.0 if rate <= 0.47 else 0.0)
    steps = [4, 8, 12, 16, 16, 20]  # of the state that each epoch began with, and four more
    factors = [1, 1, 1, 1, 0.5, 0.25]
    expected = [f * 0.02 * 0.9 ** (s / 10) for f, s in zip(factors, steps, strict=True)]
    assert [each.learning_rate for each in result.epochs] == pytest.approx(expected, rel=1e-5)


def test_the_training_step_uses_the_scaled_schedule(original):
    """With a factor of 0, weights stand still in the epochs after a flip."""
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([10_000], [0.02, 0.02])
    kept = []

    class Kernel(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            before.append(numpy(self.model.get_layer("head").bias).copy())

        def on_epoch_end(self, epoch, logs=None):
            kept.append(np.array_equal(before[-1], numpy(self.model.get_layer("head").bias)))

    before = []
    model = compressed(
        original, MAGNITUDE, learning_rate=constant, eager=False, lr_reduction_factor=0
    )
    driven(model, lambda rate: 1.0 if rate <= 0.47 else 0.0, callbacks=[Kernel()])
    assert kept == [False] * 4 + [True] * 2


def test_early_exit_waits_for_the_end_of_the_schedule(original):
    slow = {"algorithm": "magnitude_sparsity", "params": {"sparsity_target_epoch": 2}}
    model = compressed(original, slow, mode="early_exit", maximal_total_epochs=6, **BUDGET)
    result = driven(model, lambda rate: 1.0)
    assert [each.rate for each in result.epochs] == pytest.approx([0, 0.5 * (1 - 0.5**0.9), 0.5])
    assert [each.complete for each in result.epochs] == [False, False, True]
    assert result.stopped == "an epoch is within the bound" and result.rate == 0.5
    # Out of reach: every epoch is used, and the best complete one is kept.
    model = compressed(original, slow, mode="early_exit", maximal_total_epochs=5, **BUDGET)
    values = iter([0.9, 0.9, 0.2, 0.4, 0.3])
    result = driven(model, lambda rate: next(values))
    assert len(result.epochs) == 5 and not result.reached
    assert result.epoch == 3 and result.value == 0.4
    assert result.stopped == "all epochs are used up"


BUDGET = {"maximal_absolute_accuracy_degradation": 0.05}


def test_early_exit_needs_no_rate(original):
    staged = QUANTIZATION | {"params": {"weights_quant_start_epoch": 2}}
    model = compressed(original, staged, mode="early_exit", maximal_total_epochs=5, **BUDGET)
    result = fitted(model)
    assert [each.rate for each in result.epochs] == [None] * 3
    assert [each.complete for each in result.epochs] == [False, False, True]  # weights round then
    assert result.reached and "rate" not in str(result).splitlines()[-1]


def test_without_calibration_data_ranges_are_read_first(original, tmp_path):
    made = config(QUANTIZATION, mode="early_exit", maximal_total_epochs=3, **BUDGET)
    model = kc.compress_model(original, made, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    result = fitted(model, folder=tmp_path)
    # 256 samples are more than three epochs have: none was complete, the last one is kept.
    assert [each.complete for each in result.epochs] == [False] * 3
    assert not result.reached and result.epoch == 2
    assert not list(tmp_path.iterdir())  # what is being read cannot be written down
    assert all(quantizer.calibrated for quantizer in model.quantizers())


def test_learnt_masks_are_those_of_inference(original, caplog):
    learnt = {
        "algorithm": "rb_sparsity",
        "params": {"sparsity_target": 0.2, "sparsity_target_epoch": 1},
    }
    model = compressed(
        original, learnt, learning_rate=0.3, initial_training_phase_epochs=3, maximal_total_epochs=9
    )
    result = driven(model, lambda rate: 1.0)
    algorithm = model.config.algorithms[0]
    reached = [each for each in result.epochs if each.complete]
    assert result.rate == max(each.rate for each in reached) > 0.2
    assert not all(each.complete for each in result.epochs)  # masks follow with a lag
    assert algorithm.sparsity(model) >= result.rate - 0.02
    assert all(bool(numpy(entry.mask.frozen)) for entry in algorithm.masked(model))
    x = data(32, 1)[0]
    outputs = numpy(model(x, training=False))
    assert np.array_equal(outputs, numpy(kc.strip(model)(x, training=False)))
    model.fit(*data(), epochs=1, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert algorithm.sparsity(model) >= result.rate - 0.02  # they stay as they are


def test_fixed_masks_move_again(original):
    learnt = {
        "algorithm": "rb_sparsity",
        "params": {
            "sparsity_target": 0.2,
            "sparsity_target_epoch": 1,
            "sparsity_freeze_epoch": 3,
        },
    }
    model = compressed(
        original, learnt, learning_rate=0.3, initial_training_phase_epochs=5, maximal_total_epochs=9
    )
    result = driven(model, lambda rate: 1.0)
    assert result.rate > 0.25
    assert model.config.algorithms[0].sparsity(model) >= result.rate - 0.02


def test_where_no_epoch_is_within_the_lowest_rate_is_kept(original, caplog):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=9)
    with caplog.at_level(logging.WARNING):
        result = driven(model, lambda rate: 0.5 - rate)
    assert result.rate == 0.0 and not result.reached and result.value == 0.5
    assert "no epoch came within the bound" in caplog.text and "rate 0" in caplog.text
    assert model.config.algorithms[0].sparsity(model) == 0


def test_levels_that_cannot_be_reached_are_left_out(original):
    flops = {"algorithm": "filter_pruning"} | {
        "params": {"round_to": 4, "pruning_flops_target": 0.3, "schedule": "baseline"}
    }
    model = compressed(original, flops, initial_training_phase_epochs=1, maximal_total_epochs=12)
    result = driven(model, lambda rate: 1.0)
    assert 0.6 < result.rate < 0.95 and result.stopped == "the step fell below 0.025"
    rates = [each.rate for each in result.epochs]
    assert rates == sorted(rates) and result.epoch == len(rates) - 1


# What callbacks see


def test_callbacks_see_one_training(original):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=4)
    calls, history = Calls(), keras.callbacks.History()
    result = driven(model, lambda rate: 1.0, callbacks=[history, calls, kc.callbacks.Statistics()])
    assert calls.calls == ["begin", 0, 1, 2, 3, "end"]
    assert history.epoch == [0, 1, 2, 3] and model.history is history
    assert history.params["epochs"] == 4 and history.params["steps"] == 4
    assert calls.last["fake"] == 1.0
    expected = [each.rate for each in result.epochs]
    assert result.history["compression/sparsity"] == pytest.approx(expected, abs=0.01)


def test_callbacks_see_the_users_own_learning_rate(original):
    model = compressed(original, MAGNITUDE)
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    calls = Calls()
    result = driven(model, lambda rate: 1.0 if rate <= 0.47 else 0.0, callbacks=[calls, scheduler])
    factors = [1, 1, 1, 1, 0.5, 0.25]
    expected = [factor * 0.1 / (epoch + 1) for epoch, factor in enumerate(factors)]
    assert [each.learning_rate for each in result.epochs] == pytest.approx(expected, rel=1e-5)
    # What is set when an epoch begins was the number of the state that was loaded, no factor on it.
    loaded = [0.01, 0.1, 0.1 / 2, 0.1 / 3, 0.1 / 3, 0.1 / 5]
    assert calls.rates == pytest.approx(loaded, rel=1e-5)


def test_a_callback_may_end_it(original):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=9)
    stopping = keras.callbacks.EarlyStopping("loss", mode="max", patience=1)
    calls = Calls()
    result = fitted(model, callbacks=[stopping, calls])
    assert len(result.epochs) < 9 and result.stopped == "a callback stopped it"
    assert calls.calls[-1] == "end"


def test_compress_is_there_once(original):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=2)
    own = kc.callbacks.Compress()
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(own.model is self.model)

    fitted(model, callbacks=[Looks(), own])
    assert seen == [True] and model.config.algorithms[0].rate(model) > 0


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"x": np.zeros((65, 2))}, 3),
        ({"x": {"a": np.zeros((65, 2)), "b": np.zeros((65, 1))}, "batch_size": 16}, 5),
        ({"x": iter(()), "steps_per_epoch": 7}, 7),
        ({"x": iter(())}, None),
        ({"x": [(1, 2), (3, 4)]}, 2),
        ({"x": None}, None),
    ],
)
def test_steps_in_an_epoch(arguments, steps):
    assert steps_in_epoch(**arguments) == steps


def test_batches_of_a_dataset_are_counted():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 6

    assert steps_in_epoch(Batches()) == 6


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras says so of all of them
def test_the_length_of_an_epoch_is_measured_where_data_do_not_tell(original):
    import tensorflow as tf

    x, y = data()

    def batches():
        for start in range(0, 64, 16):
            yield x[start : start + 16], y[start : start + 16]

    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32))
    source = tf.data.Dataset.from_generator(batches, output_signature=spec)
    assert steps_in_epoch(source) is None
    model = compressed(original, MAGNITUDE, maximal_total_epochs=3)
    history = keras.callbacks.History()
    given = {"validation_data": data(32, 1), "baseline": 1.0, "verbose": False}
    accuracy_aware_fit(model, source, callbacks=[history], **given)
    assert history.params["steps"] == 4 and model.progress["epoch"] == 2


def test_verbose_draws_a_live_table(original):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=1)
    for verbose in (True, False):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            fitted(model, verbose=verbose)
        assert verbose or stream.getvalue() == ""


# The original


def test_the_original_is_judged_and_left_alone(original):
    model = compressed(original, QUANTIZATION, mode="early_exit", maximal_total_epochs=1, **BUDGET)
    compiled_metrics = original.metrics
    found = judged(original, model, data(32, 1))
    expected = original.evaluate(*data(32, 1), verbose=0, return_dict=True)
    assert found == pytest.approx(expected, abs=1e-6)
    assert original.metrics == compiled_metrics
    plain = keras.models.clone_model(original)  # not compiled
    plain.set_weights(original.get_weights())
    assert judged(plain, model, (*data(32, 1), np.ones(32))) == pytest.approx(expected, abs=1e-6)


# The learning rate


def test_scaled_schedule_is_saved():
    schedule = ScaledSchedule(keras.optimizers.schedules.CosineDecay(0.1, 10), 0.25)
    optimizer = keras.optimizers.SGD(schedule)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    twice = LearningRate(again, factor=0.25)
    assert twice.value == pytest.approx(0.025)
    assert twice.scale(0.5) and not twice.scale(0.5)
    assert twice.value == pytest.approx(0.05)


def test_the_learning_rate_within_a_loss_scale_optimizer():
    inner = keras.optimizers.SGD(0.1)
    rate = LearningRate(keras.optimizers.LossScaleOptimizer(inner))
    assert not rate.scale(0.5)
    assert float(numpy(inner.learning_rate)) == pytest.approx(0.05)
    with rate.without_factor():
        assert rate.value == pytest.approx(0.1)
        inner.learning_rate = 0.4
    assert rate.value == pytest.approx(0.2)


def test_a_function_as_learning_rate_is_refused():
    with pytest.raises(ValueError, match="a number or a `LearningRateSchedule`"):
        LearningRate(keras.optimizers.SGD(lambda: 0.1))


# The figure


def test_the_figure(original, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: `pip install matplotlib`")
    model = compressed(original, MAGNITUDE)
    result = driven(model, lambda rate: 1.0 if rate <= 0.47 else 0.0)
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = tmp_path / f"figure{suffix}"
        draw_accuracy(result, path)
        assert path.read_bytes().startswith(start)
    plain = compressed(original, QUANTIZATION, mode="early_exit", maximal_total_epochs=1, **BUDGET)
    with pytest.raises(ValueError, match="Expected a result with a rate"):
        draw_accuracy(fitted(plain), tmp_path / "none.svg")
    assert len(list(tmp_path.iterdir())) == 2


# Errors before any work


def test_models_that_cannot_be_trained(original):
    with pytest.raises(TypeError, match="Expected a model made by"):
        fitted(original)
    made = kc.compress_model(original, config(MAGNITUDE), verbose=False)
    with pytest.raises(ValueError, match="Expected a compiled model"):
        fitted(made)
    without = kc.compress_model(original, {"compression": [MAGNITUDE]}, verbose=False)
    without.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="with `accuracy_aware_training` in its configuration"):
        fitted(without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_data": None}, "Received: validation_data=None"),
        ({"baseline": None}, "the original model, or that model. Received: baseline=None"),
        ({"baseline": True}, "Received: baseline=True"),
        ({"baseline": float("nan")}, "a finite value"),
        ({"mode": "up"}, "Expected mode"),
        ({"seed": -1}, "Received: seed=-1"),
        ({"seed": True}, "Received: seed=True"),
        ({"epochs": 3}, "Received: epochs"),
        ({"validation_split": 0.1, "initial_epoch": 2}, "initial_epoch, validation_split"),
        ({"callbacks": [kc.callbacks.Compress(shrink=True)]}, "Received: shrink=True"),
        ({"callbacks": [keras.callbacks.CallbackList()]}, "Expected a list of callbacks"),
        ({"callbacks": [len]}, "Expected a list of callbacks"),
        ({"callbacks": keras.callbacks.BackupAndRestore("x")}, "not by `BackupAndRestore`"),
    ],
)
def test_wrong_arguments(arguments, message, original, tmp_path):
    model = compressed(original, MAGNITUDE)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        fitted(model, folder=tmp_path / "state", **arguments)
    assert same(before, weights(model)) and not (tmp_path / "state").exists()


def test_a_metric_that_is_not_logged(original, tmp_path):
    model = compressed(original, MAGNITUDE)
    listed = r"one of \['accuracy', .*'val_loss'\]. Received: metric='val_top'"
    with pytest.raises(ValueError, match=listed):
        fitted(model, metric="val_top")
    # Known before any training where the original is judged.
    before = weights(model)
    with pytest.raises(ValueError, match=r"\['val_accuracy', 'val_loss'\]"):
        fitted(model, metric="val_top", baseline=original, folder=tmp_path / "state")
    assert same(before, weights(model)) and not (tmp_path / "state").exists()
