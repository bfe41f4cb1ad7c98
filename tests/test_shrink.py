"""Channels that are removed for good, after training or in its midst."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from pruning_network import compressed, data, fitted, masks, network, outputs, pruning, relative

import keras_compress as kc
from keras_compress.shrink import shrink_in_place


def test_shrink_keeps_outputs_and_optimizer():
    model = compressed(pruning(pruning_target=0.5, pruning_steps=2))
    fitted(model, 3)
    small, optimizer = kc.shrink(model, optimizer=model.optimizer)
    assert relative(outputs(small), outputs(model)) < 1e-5
    assert len(optimizer.variables) == len(model.optimizer.variables)
    assert int(numpy(optimizer.iterations)) == int(numpy(model.optimizer.iterations)) == 12
    on = masks(model)["inner", "kernel", -1] > 0
    slots = {
        key: next(v for v in each.variables if "inner" in v.path and tuple(v.shape)[:2] == (3, 3))
        for key, each in (("before", model.optimizer), ("after", optimizer))
    }
    off_in = masks(model)["inner", "kernel", -2] > 0
    expected = numpy(slots["before"])[:, :, off_in][..., on]
    assert np.array_equal(numpy(slots["after"]), expected)
    assert all(mask.all() for mask in masks(small).values())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "adam", *(pytest.param(name, marks=SLOW) for name in ("rmsprop", "adamw", "lion"))],
)
def test_training_goes_on_as_if_nothing_had_been_removed(optimizer):
    histories = []
    for shrinks in (False, True):
        keras.utils.set_random_seed(0)
        model = compressed(pruning(pruning_target=0.5, pruning_steps=2))
        fitted(model, 3, keras.optimizers.get({"class_name": optimizer, "config": {}}))
        if shrinks:
            small, cut = kc.shrink(model, optimizer=model.optimizer)
            small.compile(cut, model.loss)
            model = small
        histories.append(fitted(model, 2).history["loss"])
    assert np.allclose(*histories, rtol=2e-4)


def test_shrinking_in_the_midst_of_fit():
    histories, models = [], []
    for shrinks in (False, True):
        keras.utils.set_random_seed(0)
        model = compressed(pruning(pruning_target=0.5, pruning_steps=2))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
        x, y = data()
        history = model.fit(
            x,
            y,
            batch_size=8,
            epochs=5,
            shuffle=False,
            verbose=0,
            validation_data=(x, y),
            callbacks=[kc.callbacks.Compress(shrink=shrinks), kc.callbacks.Statistics()],
        )
        histories.append(history.history)
        models.append(model)
    masked, small = models
    assert small.count_params() < masked.count_params()
    assert small.get_layer("inner").filters == 16
    for key in ("loss", "val_loss", "compression/FLOPs_left", "compression/pruning_level"):
        assert np.allclose(histories[0][key], histories[1][key], rtol=2e-4), key
    assert relative(outputs(kc.strip(small)), outputs(kc.strip(masked))) < 1e-3
    assert small.optimizer.iterations == 20


def test_masks_that_are_final_at_once_shrink_before_the_first_step():
    losses = []
    for shrinks in (False, True):
        keras.utils.set_random_seed(0)
        model = compressed(pruning(pruning_target=0.5, schedule="baseline"))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss)
        callbacks = [kc.callbacks.Compress(shrink=shrinks)]
        history = model.fit(*data(), 8, 2, shuffle=False, verbose=0, callbacks=callbacks)
        losses.append(history.history["loss"])
    assert model.get_layer("inner").filters == 16
    assert np.allclose(*losses, rtol=2e-4)


def test_a_shrunk_model_saves_loads_and_strips(tmp_path):
    model = compressed()
    small = kc.shrink(model)
    small.save(tmp_path / "small.keras")
    again = keras.models.load_model(tmp_path / "small.keras")
    assert np.array_equal(outputs(again), outputs(small))
    assert kc.strip(again).count_params() == kc.strip(model).count_params()


def test_pruning_goes_on_after_shrinking():
    """Levels count from the model there was at first."""
    model = compressed(pruning(pruning_target=0.75, pruning_steps=3))
    fitted(model, 2)
    assert shrink_in_place(model)
    assert model.get_layer("inner").filters == 16
    fitted(model, 2)
    assert masks(model)["inner", "kernel", -1].sum() == 8
    assert model.config.algorithms[0].sizes(model)[1].level == 0.75


def test_shrink_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="Expected a model made by"):
        kc.shrink(network())
    quantized = compressed({"algorithm": "quantization"}, data=data()[0])
    with pytest.raises(ValueError, match="Expected a model with masks"):
        kc.shrink(quantized)
    model = compressed()
    with pytest.raises(ValueError, match="built for the model"):
        kc.shrink(model, optimizer=keras.optimizers.Adam())
    fitted(model, 1, keras.optimizers.Adafactor())
    with pytest.raises(ValueError, match="Adafactor keeps a state"):
        kc.shrink(model, optimizer=model.optimizer)
