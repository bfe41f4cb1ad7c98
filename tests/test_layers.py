"""Contracts over every compressed layer class, and the edge layer."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers, ops
from layer_cases import CASES, data, plain_twin, weight_gradients

import keras_compress as kc
from keras_compress.layers import (
    FAKE_QUANT_LAYERS,
    LAYERS,
    PRUNABLE_LAYERS,
    FakeQuantConv2D,
    FakeQuantDense,
    FakeQuantize,
    PrunableDense,
    clone_layer,
    compressed_class,
    layer_spec,
)
from keras_compress.masks import ChannelMask
from keras_compress.quantizers import AsymmetricQuantizer, SymmetricQuantizer

SCALE_SHAPES = {
    layers.Conv1D: (1, 1, 4),
    layers.Conv2D: (1, 1, 1, 4),
    layers.Conv3D: (1, 1, 1, 1, 4),
    layers.Conv1DTranspose: (1, 4, 1),
    layers.Conv2DTranspose: (1, 1, 4, 1),
    layers.Conv3DTranspose: (1, 1, 1, 4, 1),
    layers.DepthwiseConv1D: (1, 3, 2),
    layers.DepthwiseConv2D: (1, 1, 3, 2),
    layers.SeparableConv1D: (1, 3, 1),
    layers.SeparableConv2D: (1, 1, 3, 1),
    layers.Dense: (1, 4),
    layers.EinsumDense: (1, 2, 3),
    layers.Embedding: (1, 4),
    layers.ReversibleEmbedding: (1, 4),
    layers.SimpleRNN: (1, 3),
    layers.GRU: (1, 9),
    layers.LSTM: (1, 12),
}
CONFIG = {
    "compression": {
        "algorithm": "quantization",
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    }
}
QUANTIZED = [cls for cls in LAYERS if LAYERS[cls].weights]
every_layer = pytest.mark.parametrize("cls", QUANTIZED, ids=lambda cls: cls.__name__)


def made(cls, **kwargs):
    """Return a built fake-quantized layer with random weights and ranges that fit them."""
    layer = FAKE_QUANT_LAYERS[cls](**CASES[cls][0], **kwargs)
    layer.build(CASES[cls][1])
    random = np.random.default_rng(1)
    for variable in layer.plain_weights:
        variable.assign(random.normal(size=variable.shape))
    layer.initialize_ranges(force=True)
    return layer


def test_every_row_has_a_class_and_a_case():
    assert set(LAYERS) == set(PRUNABLE_LAYERS) == set(CASES)
    assert set(QUANTIZED) == set(FAKE_QUANT_LAYERS)


@every_layer
def test_output_equals_the_plain_layer_with_the_effective_weight(cls):
    layer = made(cls)
    plain = plain_twin(layer)
    for weight in LAYERS[cls].weights:
        effective, raw = layer.effective_weight(weight), numpy(layer.raw_weight(weight))
        assert 0 < abs(effective - raw).max() < 0.1
        np.testing.assert_array_equal(numpy(LAYERS[cls].read(plain, weight)), effective)
    np.testing.assert_array_equal(numpy(layer(data(cls))), numpy(plain(data(cls))))


@every_layer
def test_one_scale_per_output_channel_by_default(cls):
    layer = made(cls)
    weight = layer.weight_names[0]
    (quantizer,) = layer.transforms_of(weight)
    assert tuple(quantizer.scale.shape) == SCALE_SHAPES[cls]
    raw = numpy(layer.raw_weight(weight))
    axes = tuple(i for i, size in enumerate(SCALE_SHAPES[cls]) if size == 1)
    expected = abs(raw).max(axis=axes, keepdims=True)
    np.testing.assert_allclose(numpy(quantizer.scale), np.maximum(expected, 0.1), rtol=1e-6)


@every_layer
@pytest.mark.parametrize("quantizer", [SymmetricQuantizer, AsymmetricQuantizer])
def test_gradients_reach_raw_weights_and_ranges(cls, quantizer):
    names = list(LAYERS[cls].weights)
    layer = made(cls, transforms={name: [quantizer(bits=3)] for name in names})
    for name in names:  # a range that clips: every parameter has a gradient then
        raw = numpy(layer.raw_weight(name))
        layer.transforms_of(name)[0].set_range(0.5 * raw.min(), 0.6 * raw.max())
    gradients = weight_gradients(layer, data(cls))
    variables = layer.trainable_variables
    assert len(gradients) == len(variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        assert gradient.shape == tuple(variable.shape)
        assert np.isfinite(gradient).all() and np.any(gradient), variable.path


@every_layer
def test_saving_keeps_raw_weights_bitwise(cls, tmp_path):
    layer = made(cls)
    shape = CASES[cls][1]
    inputs = keras.Input(shape[1:], dtype=data(cls).dtype.name)
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "weights.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = keras.models.clone_model(model)
    again.load_weights(tmp_path / "weights.weights.h5")
    for twin in (loaded, again):
        for before, after in zip(model.weights, twin.weights, strict=True):
            np.testing.assert_array_equal(numpy(before), numpy(after))
    for name in LAYERS[cls].weights:
        raw = numpy(loaded.layers[-1].raw_weight(name))
        np.testing.assert_array_equal(raw, numpy(layer.raw_weight(name)))
    np.testing.assert_array_equal(numpy(loaded(data(cls))), numpy(model(data(cls))))


@every_layer
def test_configuration_round_trip(cls):
    layer = made(cls)
    config = layer.get_config()
    twin = type(layer).from_config(config)
    assert twin.get_config() == config
    assert type(twin).__name__ == f"FakeQuant{cls.__name__}"
    assert isinstance(twin, cls)
    assert layer_spec(twin) is LAYERS[cls]


@every_layer
def test_half_precision_rounds_in_float32(cls):
    layer = made(cls, dtype="mixed_bfloat16")
    for name in LAYERS[cls].weights:
        raw = layer.raw_weight(name)
        (quantizer,) = layer.transforms_of(name)
        exact = numpy(quantizer(ops.convert_to_tensor(numpy(raw))))
        np.testing.assert_array_equal(layer.effective_weight(name), exact)
        assert keras.backend.standardize_dtype(quantizer.scale.dtype) == "float32"
    outputs = layer(data(cls))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    same = numpy(ops.cast(plain_twin(layer)(data(cls)), "float32"))
    np.testing.assert_array_equal(numpy(ops.cast(outputs, "float32")), same)


@every_layer
def test_keras_own_quantization_is_refused(cls):
    with pytest.raises(ValueError, match="already compressed"):
        made(cls).quantize("int8")


@every_layer
def test_without_transforms_it_is_the_keras_layer(cls):
    layer = FAKE_QUANT_LAYERS[cls](**CASES[cls][0], transforms={})
    layer.build(CASES[cls][1])
    assert layer.weights == layer.plain_weights
    np.testing.assert_array_equal(numpy(layer(data(cls))), numpy(plain_twin(layer)(data(cls))))


def test_transforms_apply_in_order():
    coarse, fine = SymmetricQuantizer(bits=2), SymmetricQuantizer(bits=8)
    layer = FakeQuantDense(4, transforms={"kernel": [coarse, fine]})
    layer.build((None, 5))
    value = numpy(fine(coarse(ops.convert_to_tensor(numpy(layer.raw_weight("kernel"))))))
    np.testing.assert_array_equal(layer.effective_weight("kernel"), value)


def test_unknown_weight_is_refused():
    message = "weights .'kernel', 'bias'.*Received transforms for: .'matrix'"
    with pytest.raises(ValueError, match=message):
        FakeQuantDense(4, transforms={"matrix": [SymmetricQuantizer()]})


def test_vectors_are_not_quantized():
    with pytest.raises(ValueError, match="`bias` may carry masks only.*quantizer for: bias"):
        FakeQuantDense(4, transforms={"bias": [SymmetricQuantizer()]})


def test_transforms_must_be_transforms():
    with pytest.raises(TypeError, match="Expected a Transform.*Received"):
        FakeQuantDense(4, transforms={"kernel": [layers.ReLU()]})


def test_the_weight_of_an_unbuilt_layer():
    # A torch module says in its own words that an attribute cannot be read.
    message = "no attribute 'kernel'" if BACKEND == "torch" else "must be built"
    with pytest.raises(AttributeError, match=message):
        FakeQuantDense(4, name="early").kernel  # noqa: B018


def test_compressed_class_of_a_layer_without_a_row():
    quantized = {"kernel": [SymmetricQuantizer()]}
    both = {"bias": [ChannelMask()], "kernel": [ChannelMask(), SymmetricQuantizer()]}
    assert compressed_class(layers.Dense(2), quantized) is FakeQuantDense
    assert compressed_class(layers.Dense(2), both) is FakeQuantDense
    assert compressed_class(layers.Dense(2), {"kernel": [ChannelMask()]}) is PrunableDense
    for transforms in (quantized, {}):
        with pytest.raises(KeyError):
            compressed_class(layers.ConvLSTM1D(2, 3), transforms)
    with pytest.raises(KeyError):
        compressed_class(layers.BatchNormalization(), quantized)


class Doubled(layers.Layer):
    """A matrix product of the user's own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], self.units), name="matrix")

    def call(self, inputs):
        return ops.matmul(inputs, self.matrix) * 2.0

    def get_config(self):
        return super().get_config() | {"units": self.units}


@pytest.fixture
def doubled():
    keras.saving.register_keras_serializable("keras_compress_tests")(Doubled)
    yield kc.register_layer(Doubled, {"matrix": (-1,)})
    del LAYERS[Doubled], FAKE_QUANT_LAYERS[Doubled], PRUNABLE_LAYERS[Doubled]


def test_a_registered_layer_is_compressed_saved_and_stripped(doubled, tmp_path):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, Doubled(3, name="own")(layers.Dense(5, name="dense")(inputs)))
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    compressed = kc.compress_model(model, CONFIG, data=x, verbose=False)
    layer = compressed.get_layer("own")
    assert type(layer) is doubled and doubled.__name__ == "FakeQuantDoubled"
    assert tuple(layer.transforms_of("matrix")[0].scale.shape) == (1, 3)
    assert compressed.plan["edges"][-1]["readers"] == ["own"]
    compressed.save(tmp_path / "model.keras")
    expected = numpy(compressed(x))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), expected)
    stripped = kc.strip(loaded)
    assert type(stripped.get_layer("own")) is Doubled
    np.testing.assert_array_equal(numpy(stripped(x)), expected)
    if BACKEND != "tensorflow":
        return  # the process that converts cannot import this file's class
    report = kc.export(loaded, tmp_path / "model.xml", data=x)
    assert report.eight_bit_layers == 2 and report.relative < 1e-5


def test_register_layer_checks_its_arguments(doubled):
    with pytest.raises(TypeError, match="subclass of `keras.layers.Layer`. Received: cls=3"):
        kc.register_layer(3, {"kernel": (-1,)})
    with pytest.raises(ValueError, match="Doubled is registered already"):
        kc.register_layer(Doubled, {"matrix": (-1,)})
    for weights in ({}, {"kernel": -1}, {"kernel": (0,)}, ["kernel"]):
        with pytest.raises(ValueError, match="Expected a dict {attribute name of a weight"):
            kc.register_layer(layers.ConvLSTM1D, weights)
    assert layers.ConvLSTM1D not in LAYERS


@pytest.mark.parametrize("cls", [layers.SimpleRNN, layers.GRU, layers.LSTM])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_recurrent_layers_take_states_masks_and_policies(cls, dtype):
    layer = FAKE_QUANT_LAYERS[cls](3, dtype=dtype, return_state=True, recurrent_dropout=0.5)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 4, 5)).astype("float32")
    states = [random.normal(size=(2, 3)).astype("float32")] * (2 if cls is layers.LSTM else 1)
    mask = np.array([[True, True, False, True], [True, False, False, False]])
    outputs = layer(x, initial_state=states, mask=mask)
    plain = cls(3, dtype=dtype, return_state=True, recurrent_dropout=0.5)
    plain.build((2, 4, 5))
    plain.set_weights(layer.plain_values())
    for output, expected in zip(outputs, plain(x, initial_state=states, mask=mask), strict=True):
        np.testing.assert_array_equal(
            numpy(ops.cast(output, "float32")), numpy(ops.cast(expected, "float32"))
        )
    assert abs(layer.effective_weight("kernel") - numpy(layer.raw_weight("kernel"))).max() < 0.01
    assert isinstance(layer.raw_weight("recurrent_kernel"), keras.Variable)


def test_a_frozen_layer_trains_neither_weights_nor_ranges():
    layer = made(layers.Conv2D)
    layer.trainable = False
    assert layer.trainable_variables == []


def test_a_handmade_subclassed_model_trains():
    class Handmade(keras.Model):
        def __init__(self):
            super().__init__()
            self.edge = FakeQuantize(AsymmetricQuantizer(bits=4))
            self.conv = FakeQuantConv2D(4, 3, activation="relu")
            self.pool = layers.GlobalAveragePooling2D()
            self.head = FakeQuantDense(1)

        def call(self, inputs):
            return self.head(self.pool(self.conv(self.edge(inputs))))

    model = Handmade()
    x = data(layers.Conv2D)
    model(x)
    model.edge.quantizer.set_range(x.min(), x.max())
    before = [numpy(v).copy() for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = model.fit(x, np.ones((len(x), 1)), epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]
    after = [numpy(v) for v in model.trainable_variables]
    assert all(t.calibrated for w in (model.conv, model.head) for t in w.transforms_of("kernel"))
    changed = [np.any(a != b) for a, b in zip(before, after, strict=True)]
    assert len(changed) == 2 + 3 + 3 and sum(changed) >= len(changed) - 1


def test_a_subclassed_model_that_was_never_called_before_training():
    class Single(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = FakeQuantDense(1)

        def call(self, inputs):
            return self.head(inputs)

    model = Single()
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="Call the model on a batch once"):
            model.fit(x, x[:, :1], verbose=0)
        return
    model.fit(x, x[:, :1], verbose=0)
    kernel = model.head.effective_weight("kernel")
    assert 0 < abs(kernel - numpy(model.head.raw_weight("kernel"))).max() < 0.1


def test_edge_layer_rounds_like_its_quantizer():
    layer = FakeQuantize(SymmetricQuantizer(bits=4, signed=True))
    x = np.linspace(-2, 2, 41, dtype="float32").reshape(1, -1)
    layer.build(x.shape)
    np.testing.assert_array_equal(numpy(layer(x)), x)
    layer.quantizer.set_range(-1.0, 1.0)
    codes = np.clip(np.floor(x * 7 + 0.5), -8, 7)
    np.testing.assert_allclose(numpy(layer(x)), codes / 7, atol=1e-6)


def test_edge_layer_round_trip(tmp_path):
    inputs = keras.Input((3,), name="features")
    layer = FakeQuantize(AsymmetricQuantizer(bits=5), name="edge")
    model = keras.Model(inputs, layer(inputs))
    layer.quantizer.set_range(-1.0, 3.0)
    model.save(tmp_path / "edge.keras")
    loaded = keras.models.load_model(tmp_path / "edge.keras")
    x = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
    assert loaded.layers[-1].quantizer.calibrated
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    assert abs(numpy(model(x)) - x).max() > 0.01


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edge_layer_in_half_precision(policy, dtype):
    """Whatever the policy, the tensor is rounded as it comes, in float32, and keeps its dtype."""
    layer = FakeQuantize(dtype=policy)
    layer.build((2,))
    layer.quantizer.set_range(-1.0, 1.0)
    x = ops.cast(np.array([[0.3, -0.71]], "float32"), dtype)
    outputs = layer(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    step = np.float32(1 / 127)
    grid = np.round(numpy(ops.cast(x, "float32")) / step) * step
    tolerance = {"float32": 1e-7, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(numpy(ops.cast(outputs, "float32")), grid, rtol=tolerance)
    assert layer(keras.KerasTensor((None, 2), dtype=dtype)).dtype == dtype


def test_clone_layer_takes_a_new_name():
    twin = clone_layer(layers.Dense(3, activation="relu", name="old"), "new")
    assert twin.name == "new" and twin.units == 3 and not twin.built
