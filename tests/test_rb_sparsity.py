"""Regularization-based sparsity as a user meets it."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.weight_masks import RBMask


def network():
    inputs = keras.Input((8,))
    x = layers.Dense(32, activation="relu", name="first")(inputs)
    x = layers.Dense(32, activation="relu", name="second")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def data(samples=128):
    """Four classes, told apart by the largest of the first four inputs."""
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    return x, x[:, :4].argmax(-1).astype("int32")


def compressed(model=None, multiplier=1.0, **params):
    algorithm = {"algorithm": "rb_sparsity", "compression_lr_multiplier": multiplier}
    config = {"compression": algorithm | {"params": params}}
    return kc.compress_model(network() if model is None else model, config, verbose=False)


def fitted(model, epochs, callbacks=(), **arguments):
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"], **arguments)
    x, y = data()
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics(), *callbacks]
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks).history


def masks(model):
    return {
        layer.name: layer.transforms_of("kernel")[0]
        for layer in model.layers
        if hasattr(layer, "weight_names")
    }


def set_logits(model, share_off):
    """Switch off the first share of every layer's weights by hand."""
    for name, mask in masks(model).items():
        logits = np.ones(mask.logits.shape, "float32")
        logits.ravel()[: round(share_off[name] * logits.size)] = -1
        mask.logits.assign(logits)


def added_loss(model):
    return float(numpy(model.config.algorithms[0].loss(model, None, None)))


def test_layers_have_learnt_masks():
    model = compressed()
    assert all(type(mask) is RBMask for mask in masks(model).values())
    assert "learnt mask, 50.0% zeros wanted" in str(model.plan["weights"])


def test_the_global_loss_is_its_formula():
    """256, 1024 and 128 weights, of which a quarter, a half and none are off."""
    model = compressed(sparsity_target=0.8, schedule="multistep", multistep_steps=[9])
    set_logits(model, {"first": 0.25, "second": 0.5, "head": 0.0})
    density = 1 - (64 + 512) / 1408
    level = 0.1  # of the first of the default `multistep_sparsity_levels`
    assert added_loss(model) == pytest.approx(((density - (1 - level)) / 0.05) ** 2, rel=1e-5)


def test_the_local_loss_is_its_formula():
    model = compressed(
        sparsity_level_setting_mode="local", schedule="multistep", multistep_steps=[9]
    )
    set_logits(model, {"first": 0.25, "second": 0.5, "head": 0.0})
    expected = np.mean([((d - 0.9) / 0.05) ** 2 for d in (0.75, 0.5, 1.0)])
    assert added_loss(model) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_level_is_reached_at_the_freezing_epoch(mode):
    model = compressed(
        multiplier=3.0,
        sparsity_target=0.7,
        sparsity_target_epoch=8,
        sparsity_freeze_epoch=14,
        sparsity_level_setting_mode=mode,
    )
    history = fitted(model, 16)
    reached = history["compression/sparsity"]
    assert abs(reached[13] - 0.7) <= 0.02
    assert reached[14] == reached[15]  # fixed
    if mode == "local":
        assert all(abs(mask.sparsity - 0.7) <= 0.05 for mask in masks(model).values())
    assert added_loss(model) == 0.0
    assert all(bool(numpy(mask.frozen)) for mask in masks(model).values())
    asked = history["compression/sparsity_asked_for"]
    # 1 - 0.3^(e/8)
    assert np.allclose(asked[:9], [1 - 0.3 ** (e / 8) for e in range(9)])


def test_training_adds_the_loss_and_evaluation_does_not():
    model = compressed(schedule="multistep", multistep_steps=[9])  # 0.1 asked for, 0 reached
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    x, y = data(8)
    trained = float(model.train_on_batch(x, y))
    evaluated = float(model.evaluate(x, y, verbose=0, batch_size=8))
    assert trained - evaluated == pytest.approx((0.1 / 0.05) ** 2, abs=0.5)  # masks are drawn


def test_stripped_weights_are_those_of_inference():
    model = compressed()
    set_logits(model, {"first": 0.25, "second": 0.5, "head": 0.0})
    plain = kc.strip(model)
    kernel = numpy(plain.get_layer("second").kernel).ravel()
    assert not kernel[:512].any() and kernel[512:].all()
    x = data()[0]
    assert np.array_equal(numpy(plain(x)), numpy(model(x, training=False)))


def test_a_run_that_was_saved_goes_on(tmp_path):
    options = {"sparsity_target": 0.6, "sparsity_target_epoch": 4, "sparsity_freeze_epoch": 5}
    model = compressed(multiplier=3.0, **options)
    fitted(model, 3)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for name, mask in masks(model).items():
        assert np.array_equal(numpy(mask.logits), numpy(masks(again)[name].logits))
        assert float(numpy(masks(again)[name].level)) == float(numpy(mask.level))
    fitted(again, 3)
    assert again.progress["rb_sparsity"]["frozen"]


def test_weight_decay_leaves_the_masks_alone():
    model = compressed(schedule="multistep", multistep_steps=[9])
    model.compile(keras.optimizers.SGD(0.0, weight_decay=0.5), "mse")
    x, y = data(8)
    before = {name: numpy(mask.logits).copy() for name, mask in masks(model).items()}
    model.train_on_batch(x, np.zeros((8, 4), "float32"))
    assert all(np.array_equal(before[n], numpy(mask.logits)) for n, mask in masks(model).items())


def test_masks_that_lag_behind_are_fixed_with_a_warning(caplog):
    options = {"schedule": "multistep", "multistep_steps": [1], "sparsity_freeze_epoch": 2}
    fitted(compressed(**options), 3)
    assert "fixed at a sparsity of 0.0%, although 50.0% was asked for" in caplog.text
