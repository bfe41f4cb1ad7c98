"""Staged quantization: what is switched on when, and what that changes."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.algorithms.quantizer_options import StagedParams

LOSS = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}


def network():
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def data(samples=32):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 6, 6, 2)).astype("float32")
    return x, random.integers(0, 3, samples)


def staged(params, with_data=True, **options):
    algorithm = {"algorithm": "quantization", "params": params} | options
    model = kc.compress_model(
        network(), {"compression": algorithm}, data()[0] if with_data else None, verbose=False
    )
    model.compile("sgd", **LOSS)
    return model


class Switches(keras.callbacks.Callback):
    """Notes (weights are on, activations are on) at the start of every epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(switches(self.model))


def switches(model):
    weight = model.get_layer("conv").transforms_of("kernel")[0]
    return weight.is_on, model.get_layer("conv-fake_quantize").quantizer.is_on


def fit(model, epochs, **kwargs):
    noted = Switches()
    callbacks = [kc.callbacks.Compress(), noted]
    model.fit(*data(), batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs)
    return noted.seen


@pytest.mark.parametrize("with_data", [True, False])
def test_each_group_has_its_epoch(with_data):
    params = {"weights_quant_start_epoch": 2, "activations_quant_start_epoch": 1}
    model = staged(params, with_data)
    assert switches(model) == (False, False)
    assert fit(model, 4) == [(False, False), (False, True), (True, True), (True, True)]


def test_one_epoch_given_leaves_the_other_at_its_default():
    assert fit(staged({"weights_quant_start_epoch": 0}), 2) == [(True, False), (True, True)]
    params = StagedParams()
    assert params.start_epoch("weights") == params.start_epoch("activations") == 0
    assert not StagedParams(base_lr=0.1).stages("weights")


def test_it_is_the_float_model_until_then():
    model, plain = staged({"weights_quant_start_epoch": 3}), network()
    plain.set_weights([numpy(v) for layer in model.layers for v in plain_weights(layer)])
    x = data()[0]
    np.testing.assert_array_equal(numpy(model(x, training=False)), numpy(plain(x)))
    fit(model, 4)
    plain.set_weights([numpy(v) for layer in model.layers for v in plain_weights(layer)])
    assert np.abs(numpy(model(x, training=False)) - numpy(plain(x))).max() > 1e-4


def plain_weights(layer):
    return layer.plain_weights if hasattr(layer, "plain_weights") else ()


def test_weights_get_their_range_when_they_are_switched_on():
    model = staged({"weights_quant_start_epoch": 1}, learn_ranges=False)
    layer = model.get_layer("conv")
    layer.raw_weight("kernel").assign(3 * numpy(layer.raw_weight("kernel")))
    before = numpy(layer.transforms_of("kernel")[0].scale)
    fit(model, 2)
    after = numpy(layer.transforms_of("kernel")[0].scale)
    assert (after > 2 * before).all()


def test_a_saved_run_goes_on(tmp_path):
    params = {"weights_quant_start_epoch": 2, "activations_quant_start_epoch": 1}
    model = staged(params)
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert switches(again) == switches(model) == (False, True)
    x = data()[0]
    np.testing.assert_array_equal(numpy(again(x)), numpy(model(x)))
    assert fit(again, 3, initial_epoch=2) == [(True, True)]


def test_strip_gives_what_is_on():
    x = data()[0]
    for epochs in (1, 2, 3):
        model = staged({"weights_quant_start_epoch": 2, "activations_quant_start_epoch": 1})
        fit(model, epochs)
        stripped = kc.strip(model)
        np.testing.assert_array_equal(numpy(stripped(x)), numpy(model(x, training=False)))


def test_the_decay_of_ranges_is_its_formula():
    model = staged({}, range_decay=0.5, activations={"bits": 4})
    (algorithm,) = model.config.algorithms
    quantizers = [layer.quantizer for layer in model.layers if hasattr(layer, "quantizer")]
    learnt = [numpy(q.scale) for q in quantizers if q.learnable]
    assert len(learnt) == len(quantizers) - 1  # the range of the model's input is not trained
    expected = 0.25 * sum(float(scale) ** 2 for scale in learnt)
    assert float(numpy(algorithm.loss(model, None, None))) == pytest.approx(expected, rel=1e-6)
    before = learnt[0]
    model.compile(keras.optimizers.SGD(0.1), **LOSS)
    model.fit(*data(), epochs=5, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert numpy(quantizers[1].scale) < before
    assert staged({}).config.algorithms[0].loss(model, None, None) is None
