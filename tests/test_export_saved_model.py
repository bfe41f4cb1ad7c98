"""The deployable model and its SavedModel: the numbers of the trained one."""

import json

import keras
import models
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from export_helpers import IMAGE, compressed, images, network, outputs_of

import keras_compress as kc
from keras_compress.export.saved_model import (
    FixedFakeQuantize,
    deployable,
    serving_function,
    signature_names,
    wide_range,
)
from keras_compress.layers import FakeQuantize
from keras_compress.quantizers import AsymmetricQuantizer, SymmetricQuantizer

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="on other backends this code runs in the child process: test_export_openvino.py",
)

QUANTIZERS = {
    "signed": (SymmetricQuantizer, {}, (-2.3, 1.9)),
    "unsigned": (SymmetricQuantizer, {}, (0.0, 5.7)),
    "signed narrow": (SymmetricQuantizer, {"narrow_range": True}, (-2.3, 1.9)),
    "unsigned narrow": (SymmetricQuantizer, {"narrow_range": True}, (0.0, 2.1)),
    "asymmetric": (AsymmetricQuantizer, {}, (-0.7, 2.1)),
    "asymmetric, mostly negative": (AsymmetricQuantizer, {"narrow_range": True}, (-7.0, 0.3)),
    "signed 4 bits": (SymmetricQuantizer, {"bits": 4}, (-1.1, 1.0)),
    "unsigned 4 bits": (SymmetricQuantizer, {"bits": 4}, (0.0, 1.0)),
    "asymmetric 4 bits": (AsymmetricQuantizer, {"bits": 4}, (-0.4, 1.0)),
    "signed 2 bits": (SymmetricQuantizer, {"bits": 2}, (-1.0, 1.0)),
    "unsigned 6 bits": (SymmetricQuantizer, {"bits": 6}, (0.0, 3.3)),
    "half range": (SymmetricQuantizer, {"half_range": True}, (-1.3, 1.0)),
}


def quantized_edge(name):
    make, arguments, extremes = QUANTIZERS[name]
    layer = FakeQuantize(make(**arguments))
    layer.build((None, 64))
    layer.quantizer.set_range(*extremes)
    return layer


@tensorflow_only
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_fixed_quantizer_gives_the_trained_numbers(name):
    trained = quantized_edge(name)
    fixed = FixedFakeQuantize.from_config(trained.get_config())
    fixed.build((None, 64))
    fixed.set_weights(trained.get_weights())
    x = np.random.default_rng(0).normal(size=(500, 64)).astype("float32") * 2
    # In units of the step, which exposes a neighbouring level as an error of 1.
    difference = np.abs(numpy(fixed(x)) - numpy(trained(x))) / trained.quantizer.step()
    assert difference.max() <= 1e-4


@tensorflow_only
def test_ranges_per_channel_run_as_arithmetic():
    trained = FakeQuantize(SymmetricQuantizer(axis=(-1,)))
    trained.build((None, 4))
    trained.quantizer.set_range(-np.arange(1.0, 5.0), np.arange(1.0, 5.0))
    fixed = FixedFakeQuantize.from_config(trained.get_config())
    fixed.build((None, 4))
    fixed.set_weights(trained.get_weights())
    x = np.random.default_rng(0).normal(size=(500, 4)).astype("float32") * 2
    np.testing.assert_allclose(numpy(fixed(x)), numpy(trained(x)), atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "step", "levels", "wide"),
    [
        (0.0, 255.0, 1.0, 256, (0, 255)),
        (-128.0, 127.0, 1.0, 256, (-128, 127)),
        (-127.0, 127.0, 1.0, 255, (-128, 127)),
        (0.0, 15.0, 1.0, 16, (0, 255)),
        (-3.0, 12.0, 1.0, 16, (-128, 127)),
        (-200.0, 54.0, 1.0, 255, (-200, 55)),
        (0.0, 1.5, 0.5, 4, (0, 127.5)),
    ],
)
def test_narrow_grids_are_held_by_one_of_256_levels(low, high, step, levels, wide):
    assert wide_range(low, high, step, levels) == wide


@tensorflow_only
def test_the_deployable_model_gives_the_trained_numbers():
    model = compressed()
    flat = deployable(model)
    assert not [x for x in flat.layers if type(x).__module__ == "keras_compress.layers"]
    for expected, received in zip(outputs_of(model), outputs_of(flat, [images()]), strict=True):
        # A product of matrices is summed in another order than Keras' own `Dense` of rows.
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6 * abs(expected).max())


@tensorflow_only
def test_mixed_precision_is_deployed_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = compressed(network())
    flat = deployable(model)
    assert {layer.compute_dtype for layer in flat.layers[1:]} == {"float32"}
    expected, received = outputs_of(model)[0].astype("float32"), outputs_of(flat, [images()])[0]
    np.testing.assert_allclose(received, expected, atol=0.05 * np.ptp(expected))


def test_uncalibrated_models_are_refused():
    model = kc.compress_model(network(), {"compression": {"algorithm": "quantization"}})
    with pytest.raises(ValueError, match="without a range"):
        deployable(model)


def test_names_are_those_of_inputs_and_output_layers():
    model = models.make("dict_inputs_outputs")
    inputs, outputs = signature_names(model)
    assert inputs == [tensor.name for tensor in model.inputs]
    assert outputs == model.output_names


def test_outputs_of_one_name_are_numbered():
    assert signature_names(models.make("passed_through")) == (
        ["features"],
        ["features_1", "dense", "dense_1"],
    )


def test_outputs_that_no_layer_makes_have_stable_names():
    model = models.make("subclassed_two_inputs")
    assert signature_names(model) == signature_names(model)
    assert signature_names(model)[1][0] == "output_0"


@tensorflow_only
def test_the_serving_function_takes_and_gives_named_tensors():
    model = models.make("list_inputs_outputs")
    inputs, outputs = signature_names(model)
    serve = serving_function(deployable(model), inputs, outputs).get_concrete_function()
    assert list(serve.structured_outputs) == outputs
    names = [tensor.name.partition(":")[0] for tensor in serve.inputs[: len(inputs)]]
    assert names == inputs
    assert all(tensor.shape[0] is None for tensor in serve.inputs[: len(inputs)])


def test_a_saved_model_runs_in_tensorflow_and_holds_its_origin(tmp_path):
    import tensorflow as tf

    model = compressed()
    kc.export(model, tmp_path / "model", verify=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    serve = loaded.signatures["serving_default"]
    received = serve(**{IMAGE: tf.constant(images())})
    assert sorted(received) == sorted(model.output_names)
    for name, expected in zip(model.output_names, outputs_of(model), strict=True):
        differs = np.abs(received[name].numpy() - expected) > 1e-5
        # Another backend may round a value in the middle between two levels the other way.
        assert differs.mean() <= (0 if BACKEND == "tensorflow" else 1e-3)
    origin = json.loads((tmp_path / "model/assets.extra/keras_compress.json").read_text())
    assert origin["version"] == kc.__version__
    assert origin["config"]["compression"][0]["algorithm"] == "quantization"
