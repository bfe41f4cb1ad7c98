"""The callbacks: the clock, calibration from the first batches, statistics, export."""

import importlib
import pathlib

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy, one_step_per_execution
from keras import layers

import keras_compress as kc

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = X[:, :1] * 2


def compressed(samples=16, data=None, **options):
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(8, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(1, name="head")(x), name="net")
    initializer = {
        "range": {"type": "min_max", "num_init_samples": samples},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
    }
    algorithm = {"algorithm": "quantization", "initializer": initializer}
    return kc.compress_model(model, {"compression": algorithm | options}, data=data, verbose=False)


def input_scale(model):
    return float(numpy(model.get_layer("features-fake_quantize").quantizer.scale))


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=one_step_per_execution)])
def test_ranges_come_from_the_first_samples_only(steps):
    model = compressed()
    model.compile("sgd", "mse", steps_per_execution=steps)
    model.optimizer.learning_rate = 0.0
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[kc.callbacks.Compress()])
    seen = {1: 16, 3: 24}[steps]  # whole groups of batches
    assert input_scale(model) == pytest.approx(abs(X[:seen]).max(), rel=1e-6)


def test_too_few_samples_are_made_do_with():
    model = compressed(samples=1000)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(X, Y, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert input_scale(model) == pytest.approx(abs(X).max(), rel=1e-6)
    assert not model.run_eagerly


def test_validation_data_takes_no_part_in_ranges():
    model = compressed(samples=64)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    callbacks = [kc.callbacks.Compress()]
    model.fit(X, Y, epochs=3, validation_data=(100 * X, Y), verbose=0, callbacks=callbacks)
    assert input_scale(model) == pytest.approx(abs(X).max(), rel=1e-6)


def test_inference_compiled_before_calibration_is_compiled_anew():
    model = compressed()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    before = model.predict(X, verbose=0)
    loss = model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[kc.callbacks.Compress()])
    after = model.predict(X, verbose=0)
    assert abs(after - before).max() > 0
    np.testing.assert_allclose(after, kc.strip(model).predict(X, verbose=0), atol=1e-6)
    assert model.evaluate(X, Y, verbose=0) != loss


def test_evaluation_alone_observes_nothing():
    model = compressed()
    model.compile("sgd", "mse")
    model.evaluate(X, Y, verbose=0, callbacks=[kc.callbacks.Compress()])
    model.predict(X, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert all(quantizer.observer is None for quantizer in model.quantizers())
    assert not model.run_eagerly


def test_the_users_eager_mode_stays():
    model = compressed()
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(X, Y, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert model.run_eagerly


def test_training_goes_on_after_calibration_and_with_data_from_the_start():
    for data in (None, X):
        model = compressed(data=data)
        model.compile(keras.optimizers.Adam(0.02), "mse")
        callbacks = [kc.callbacks.Compress()]
        losses = model.fit(X, Y, epochs=12, verbose=0, callbacks=callbacks).history["loss"]
        assert losses[-1] < 0.5 * losses[0]
        assert len(model.quantizers()) == 4


def test_fit_without_the_callback_after_calibration():
    model = compressed()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


@pytest.mark.skipif(BACKEND == "torch", reason="torch has no XLA")
def test_training_compiled_by_xla():
    model = compressed(data=X)
    model.compile("adam", "mse", jit_compile=True)
    losses = model.fit(X, Y, epochs=5, verbose=0, callbacks=[kc.callbacks.Compress()]).history[
        "loss"
    ]
    assert losses[-1] < losses[0]


def test_excluded_from_weight_decay_beside_the_users_own():
    model = compressed(data=X)
    optimizer = keras.optimizers.SGD(1e-7, weight_decay=1e6)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.get_layer("hidden").bias.assign(np.ones(8))
    scale = input_scale(model)
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    np.testing.assert_allclose(numpy(model.get_layer("hidden").bias), np.ones(8), atol=1e-3)
    assert input_scale(model) == pytest.approx(scale, rel=1e-3)


def test_compiled_inference_outlives_training():
    """Unless ranges were read in it: then it was compiled before there was anything to round."""
    model = compressed(data=X)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    functions = model.predict_function, model.test_function
    for _ in range(2):
        model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[kc.callbacks.Compress()])
        assert (model.predict_function, model.test_function) == functions
    # Weights and ranges are variables: what was compiled before reads them as they are.
    np.testing.assert_allclose(
        model.predict(X, verbose=0), kc.strip(model).predict(X, verbose=0), atol=1e-6
    )


def test_compiled_functions_follow_a_grid_that_gets_a_sign():
    """Weights may have another sign than in `compress_model` at the epoch that rounds them."""
    staged = {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 0}
    model = compressed(data=X, params=staged)
    kernel = model.get_layer("hidden").raw_weight("kernel")
    signs = np.sign(numpy(kernel))
    (quantizer,) = model.get_layer("hidden").transforms_of("kernel")
    kernel.assign(abs(numpy(kernel)))
    quantizer.set_range(0.0, 1.0)
    quantizer.signed = False
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    flip = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kernel.assign(signs * abs(numpy(kernel)))
    )
    callbacks = [flip, kc.callbacks.Compress()]
    losses = model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks).history["loss"]
    assert quantizer.signed
    expected = kc.strip(model).predict(X, verbose=0)
    assert losses[1] == pytest.approx(np.square(expected - Y).mean(), rel=1e-4)
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-6)


def test_statistics_are_in_the_history():
    model = compressed(data=X, weights={"bits": 4})
    model.compile("sgd", "mse")
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks).history
    assert history["compression/mean_bits"] == [6.0, 6.0]
    assert history["compression/quantizers"] == [4.0, 4.0]


@pytest.mark.parametrize("callback", [kc.callbacks.Compress, kc.callbacks.Statistics])
def test_other_models_are_refused(callback):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)], name="plain")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="compress_model.*Received: model 'plain'"):
        model.fit(X, Y, verbose=0, callbacks=[callback()])


def exports_of(monkeypatch, values, **options):
    """Feed a monitored quantity to `ExportIR` and return the epochs that were exported."""
    written, epochs = [], []
    module = importlib.import_module("keras_compress.export")
    monkeypatch.setattr(module, "export", lambda *arguments, **_: written.append(arguments))
    callback = kc.callbacks.ExportIR("net.xml", **options)
    callback.set_model("model")
    for epoch, value in enumerate(values):
        before = len(written)
        callback.on_epoch_end(epoch, {callback.monitor: value})
        epochs += [epoch] * (len(written) - before)
    assert set(written) == {("model", pathlib.Path("net.xml"))}
    return epochs


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"monitor": "val_loss"}, [0, 2]),
        ({"monitor": "mean_absolute_error"}, [0, 2]),
        ({"monitor": "val_accuracy"}, [0, 1, 4]),
        ({"monitor": "perplexity", "mode": "min"}, [0, 2]),
        ({"monitor": "val_loss", "mode": "max"}, [0, 1, 4]),
    ],
)
def test_the_best_epochs_are_exported(monkeypatch, options, expected):
    values = [2.0, 3.0, 1.0, np.nan, 4.0]
    assert exports_of(monkeypatch, values, **options) == expected


def test_unknown_mode_and_quantity():
    with pytest.raises(ValueError, match="Received: mode='best'"):
        kc.callbacks.ExportIR("net.xml", mode="best")
    with pytest.raises(
        ValueError, match="'val_acc', which is not logged. Expected one of .'loss'."
    ):
        kc.callbacks.ExportIR("net.xml", monitor="val_acc").on_epoch_end(0, {"loss": 1.0})
