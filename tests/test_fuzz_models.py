"""Random models with random configurations go all the way, or are refused by one clear error."""

import random

import fuzz_models
import fuzz_networks
import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers, ops

import keras_compress as kc
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace

SEEDS = range(12)
EXPORTED = range(0, 12, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_fuzzed_models(seed, tmp_path):
    trial = fuzz_models.Trial(seed)
    trial.eagerly = True  # the rest is for the long run
    export = seed in EXPORTED and BACKEND == "tensorflow"  # a child process elsewhere
    outcome = fuzz_models.go(trial, tmp_path, export=export)
    assert outcome.verdict in ("done", "refused"), (trial.what, trial.config, outcome)


def test_every_algorithm_is_drawn():
    drawn = [fuzz_models.random_algorithms(random.Random(seed)) for seed in range(100)]
    assert len({entry["algorithm"] for entries in drawn for entry in entries}) == 8


def test_a_step_of_rounding_explains_a_difference_and_nothing_else_does(tmp_path):
    inputs = keras.Input((4,))
    trial = fuzz_models.Trial(0)
    trial.model = keras.Model(inputs, layers.Dense(3, name="dense")(inputs))
    trial.data = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    config = {"compression": {"algorithm": "quantization"}}
    model = kc.compress_model(trial.model, config, data=trial.data, verbose=False)
    course = fuzz_models.Course(trial, tmp_path, export=False)
    course.stage = "export"
    with pytest.raises(fuzz_models.Different, match=r"export: by 0.9; rounding explains"):
        course.require_flip(model, course.outputs(model), 0.9)
    # All values in the middle of two levels: neighbouring outputs differ by a step.
    levels = np.unique(numpy(model.layers[1](np.linspace(-2, 2, 4001)[:, None].repeat(4, 1))))
    trial.data = np.full((8, 4), (levels[200] + levels[201]) / 2, "float32")
    course.require_flip(model, course.outputs(model), 1e-3)
    assert course.flips == ["export"]


# What fuzzing found, each as a case of its own


def test_sizes_survive_the_parts_of_an_attention_layer(tmp_path):
    """A layer behind it may need them: of an `EinsumDense` Keras takes some to be unknown."""
    inputs = keras.Input((6, 5), name="sequence")
    x = layers.GroupQueryAttention(3, 4, 2, name="attention")(inputs, inputs)
    x = layers.Dense(6, name="mixed")(layers.Permute((2, 1), name="turned")(x))
    model = keras.Model(inputs, x)
    data = np.random.default_rng(0).normal(size=(2, 6, 5)).astype("float32")
    flat = rebuild(trace(model))
    assert flat.get_layer("attention-query").output.shape == (None, 6, 4, 3)
    np.testing.assert_allclose(numpy(flat(data)), numpy(model(data)), atol=1e-6)
    config = {"compression": {"algorithm": "quantization"}}
    compressed = kc.compress_model(model, config, data=data, verbose=False)
    compressed.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = numpy(compressed(data))
    np.testing.assert_array_equal(numpy(again(data)), expected)
    np.testing.assert_array_equal(numpy(kc.strip(compressed)(data)), expected)


def test_a_product_that_is_shared_by_two_inputs():
    first, second = keras.Input((6, 5), name="first"), keras.Input((6, 5), name="second")
    dense = layers.EinsumDense("abc,cd->abd", output_shape=(None, 4), name="shared")
    model = keras.Model([first, second], [dense(first), dense(second)])
    assert [edge.shape for edge in trace(model).outputs] == [(None, 6, 4)] * 2
    assert rebuild(trace(model)).output_shape == [(None, 6, 4)] * 2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its export would start a process")
def test_an_operation_that_openvino_lacks_is_named(tmp_path):
    inputs = keras.Input((4, 5))
    x = layers.Embedding(5, 2)(ops.argmax(inputs, axis=-1))
    with pytest.raises(ValueError, match="OpenVINO has an equivalent of. Received: Bitcast"):
        kc.export(keras.Model(inputs, x), tmp_path / "model.xml")
    y = layers.Bidirectional(layers.LSTM(3))(x)  # fails there, for the same reason
    with pytest.raises(ValueError, match="OpenVINO has an equivalent of. Received: "):
        kc.export(keras.Model(inputs, y), tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its export would start a process")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("cls", [layers.Conv1D, layers.DepthwiseConv1D, layers.Conv1DTranspose])
def test_fewer_bits_behind_a_bias_that_is_no_part_of_the_convolution(cls, bits, tmp_path):
    """The CPU plugin joined such a bias with the clip of the rounding: off by whole steps."""
    inputs = keras.Input((6, 6), name="signal")
    arguments = {} if cls is layers.DepthwiseConv1D else {"filters": 6}
    x = cls(kernel_size=3, padding="same", name="conv", **arguments)(inputs)
    model = fuzz_networks.gentle(keras.Model(inputs, layers.Dense(3, name="dense")(x)))
    data = np.random.default_rng(0).normal(size=(8, 6, 6)).astype("float32")
    config = {"compression": {"algorithm": "quantization", "activations": {"bits": bits}}}
    compressed = kc.compress_model(model, config, data=data, verbose=False)
    report = kc.export(compressed, tmp_path / "model.xml", data=data)
    assert report.relative < 1e-5 and report.eight_bit_layers == 2


@pytest.mark.parametrize("kind", ["add", "multiply", "subtract"])
@pytest.mark.parametrize("sizes", [(6,), (6, 5), (6, 5, 5)])
def test_the_plugin_clips_at_the_right_place(kind, sizes):
    opset = pytest.importorskip("openvino.opset15")
    import openvino as ov

    from keras_compress.export.plugin_repairs import keep_clips

    rank = len(sizes) + 1
    constant = np.linspace(0.3, 0.8, 6).astype("float32").reshape((1, 6) + (1,) * (rank - 2))
    low, high, start, end = (np.full((1,) * rank, v, "float32") for v in (-2.4, 2.1, -38.4, 38.1))
    given = opset.parameter([-1, *sizes], np.float32)
    x = getattr(opset, kind)(given, constant)
    x = opset.maximum(opset.minimum(x, high), low)
    graph = ov.Model([opset.fake_quantize(x, start, end, start, end, 256)], [given])
    assert keep_clips(graph) == 1
    data = np.random.default_rng(0).normal(0, 2, (8, *sizes)).astype("float32")
    expected = np.clip(getattr(np, kind)(data, constant), low, high)
    step = (end - start) / 255
    expected = np.round((expected - start) / step) * step + start
    found = next(iter(ov.compile_model(graph, "CPU")(data).values()))
    assert np.mean(np.abs(found - expected) > step / 2) < 0.01
