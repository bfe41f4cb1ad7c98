"""`strip(model, like=original)`: trained weights back in the user's own class structure."""

import json

import keras
import models
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.graph.trace import trace
from keras_compress.graph.weight_map import WeightMap, copy_model
from keras_compress.layers import CompressedLayer, FakeQuantDense

INITIALIZER = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
ALL_QUANTIZED = {"compression": {"algorithm": "quantization", "initializer": INITIALIZER}}
ONLY_WEIGHTS = {
    "compression": ALL_QUANTIZED["compression"] | {"activations": {"ignored_scopes": "{re}.*"}}
}
every_model = pytest.mark.parametrize("name", models.MODELS)


def run(model, inputs):
    return [numpy(leaf) for leaf in keras.tree.flatten(model(inputs, training=False))]


def values(model):
    return [numpy(variable).copy() for variable in model.weights]


def assert_equal(arrays, others):
    for array, other in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(array, other)


def compress(model, inputs=None, config=ONLY_WEIGHTS):
    inputs = models.inputs_for(model, samples=8) if inputs is None else inputs
    return kc.compress_model(model, config, data=inputs, verbose=False)


def train(model, inputs):
    targets = keras.tree.map_structure(lambda leaf: numpy(leaf) * 0 + 1.0, model(inputs))
    losses = keras.tree.map_structure(lambda _: "mse", targets)
    model.compile(keras.optimizers.Adam(0.05), losses, run_eagerly=True)
    model.fit(inputs, targets, epochs=2, verbose=0)


@every_model
def test_trained_weights_return_to_the_original_structure(name, tmp_path):
    model = models.make(name)
    inputs = models.inputs_for(model, samples=8)
    original = values(model)
    compressed = compress(model, inputs)
    untrained = values(kc.strip(compressed, like=model))
    train(compressed, inputs)
    twin = kc.strip(compressed, like=model)
    compressed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)

    assert compressed.plan["edges"] == []
    assert type(twin) is type(model) and twin.name == model.name and not twin.compiled
    assert [v.path for v in twin.weights] == [v.path for v in model.weights]
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]
    for expected, received in zip(run(compressed, inputs), run(twin, inputs), strict=True):
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6 * abs(expected).max())
    for before, after, variable in zip(untrained, values(twin), twin.weights, strict=True):
        assert np.any(before != after) or "kernel" not in variable.path, variable.path
    assert_equal(values(kc.strip(loaded, like=model)), values(twin))
    assert_equal(values(model), original)
    assert not set(map(id, twin.variables)) & set(map(id, model.variables + compressed.variables))


@every_model
def test_every_weight_has_its_place(name):
    model = models.make(name)
    graph = trace(model)
    weights = values(model)
    found = set()
    for layer, positions in graph.weight_map.layers.items():
        assert_equal(graph.layer_nodes()[layer].op.get_weights(), [weights[p] for p in positions])
        found.update(positions)
    assert found == set(range(len(weights)))
    assert graph.weight_map.paths == [variable.path for variable in model.weights]
    data = json.loads(json.dumps(graph.weight_map.to_dict()))
    assert WeightMap(**data) == graph.weight_map


def test_a_separable_convolution_is_joined_again():
    paths = ["separable/depthwise_kernel", "separable/pointwise_kernel", "separable/bias"]
    weight_map = trace(models.make("separable")).weight_map
    assert weight_map.paths[:3] == paths
    assert weight_map.layers["separable-depthwise"] == [0]
    assert weight_map.layers["separable-pointwise"] == [1, 2]


def test_the_weights_are_those_of_the_flat_stripped_model():
    model = models.make("residual")
    inputs = models.inputs_for(model, samples=8)
    compressed = compress(model, inputs, ALL_QUANTIZED)
    train(compressed, inputs)
    twin, flat = kc.strip(compressed, like=model), kc.strip(compressed)
    for layer in model.layers:
        assert_equal(values(twin.get_layer(layer.name)), values(flat.get_layer(layer.name)))
    (received,), (expected,) = run(twin, inputs), run(flat, inputs)
    assert 0 < abs(received - expected).max() < 0.1 * abs(expected).max()
    assert not any(isinstance(layer, CompressedLayer) for layer in twin.layers)


def test_like_may_be_another_model_of_the_same_structure():
    model = models.make("subclassed")
    compressed = compress(model)
    other = models.subclassed()
    before = values(other)
    other.compile("sgd", "mse")
    assert_equal(values(kc.strip(compressed, like=other)), values(kc.strip(compressed, like=model)))
    assert_equal(values(other), before)
    assert other.compiled


def test_a_class_that_is_not_registered_is_copied():
    class Local(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.spare = layers.Dense(2, name="spare")
            self.head = layers.Dense(3, name="head")

        def build(self, input_shape):
            self.spare.build(input_shape)
            self.head.build(input_shape)

        def call(self, inputs):
            return self.head(inputs)

    model = Local()
    inputs = np.ones((4, 6), "float32")
    model(inputs)
    models.randomize(model)
    compressed = compress(model, inputs)
    twin = kc.strip(compressed, like=model)
    assert type(twin) is Local
    assert_equal(run(twin, inputs), run(compressed, inputs))
    # What no output depends on was not trained, and stays as it is.
    assert_equal(values(twin.spare), values(model.spare))


def test_an_adapted_normalization_comes_along():
    def network():
        normalization = layers.Normalization(name="normalization")
        return keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2, name="head")])

    inputs = np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32")
    model = network()
    model.layers[0].adapt(inputs)
    compressed = compress(model, inputs)
    for like in (model, network()):
        assert_equal(run(kc.strip(compressed, like=like), inputs), run(compressed, inputs))


def test_what_is_frozen_stays_frozen():
    model = models.make("subclassed")
    model.first.trainable = False
    model.second.norm.trainable = False
    twin = kc.strip(compress(model), like=model)
    frozen = [twin.first, twin.first.conv, twin.first.norm, twin.second.norm]
    assert not any(layer.trainable for layer in frozen) and twin.second.conv.trainable
    paths = [variable.path for variable in model.trainable_variables]
    assert [variable.path for variable in twin.trainable_variables] == paths


def test_like_must_be_a_built_model():
    compressed = compress(models.make("sequential"))
    with pytest.raises(TypeError, match=r"Expected a Keras 3 model.*Received: model='float.keras'"):
        kc.strip(compressed, like="float.keras")
    for unbuilt in (models.Classifier(), keras.Sequential([layers.Dense(2)])):
        with pytest.raises(ValueError, match="Expected a built model"):
            kc.strip(compressed, like=unbuilt)


def dense_network(units=4, use_bias=True):
    hidden = layers.Dense(units, use_bias=use_bias, name="hidden")
    return keras.Sequential([keras.Input((6,)), hidden, layers.Dense(2, name="head")], name="net")


def test_weights_of_like_must_fit():
    compressed = compress(dense_network())
    with pytest.raises(
        ValueError,
        match=r"'net/hidden/kernel' of `like` does not fit: expected the shape \(6, 4\) of "
        r"'kernel' in layer 'hidden'. Received: shape \(6, 5\)",
    ):
        kc.strip(compressed, like=dense_network(units=5))
    with pytest.raises(
        ValueError,
        match="like='net' with 3 weights in place of 4; the first that differs is "
        "'net/head/kernel' in place of 'net/hidden/bias'",
    ):
        kc.strip(compressed, like=dense_network(use_bias=False))
    one_layer = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
    with pytest.raises(ValueError, match="with 4 weights in place of 2.*/kernel' in place of none"):
        kc.strip(compress(one_layer), like=dense_network())


def test_a_compressed_model_without_a_map():
    model = dense_network()
    compressed = compress(model)
    config = compressed.get_config()
    del config["compression"]["weight_map"]
    older = kc.CompressedModel.from_config(config)
    older.set_weights(compressed.get_weights())
    by_hand = keras.Sequential([keras.Input((6,)), FakeQuantDense(4)])
    for without in (older, by_hand, dense_network()):
        with pytest.raises(ValueError, match=r"made by this version.*without such a map.*without"):
            kc.strip(without, like=model)


def test_quantizers_without_a_range_come_first():
    model = models.make("sequential")
    compressed = kc.compress_model(model, ALL_QUANTIZED, verbose=False)
    with pytest.raises(ValueError, match="quantizers without a range"):
        kc.strip(compressed, like=model)


def around(layer):
    inputs = keras.Input((6,), name="features")
    return keras.Model(inputs, layer(layers.Dense(4, name="before")(inputs)), name="around")


def test_a_model_that_cannot_be_copied_is_refused():
    class Scaled(layers.Dense):
        def __init__(self, units, factor):
            super().__init__(units, name="scaled")
            self.factor = factor

        def call(self, inputs):
            return super().call(inputs) * self.factor

    with pytest.raises(ValueError, match=r"'around' \(Functional\) cannot be copied.*get_config"):
        copy_model(around(Scaled(2, factor=3.0)))


def test_a_copy_with_other_weights_is_refused():
    class Forgetful(layers.Dense):
        def load_own_variables(self, store):
            pass

    with pytest.raises(ValueError, match="another weight 'forgetful/kernel'"):
        copy_model(around(Forgetful(2, name="forgetful")))


def test_weights_that_were_trained_apart_are_refused():
    scaled = models.ListedWeights(4, name="scaled")
    inputs = keras.Input((6,), name="features")
    model = keras.Model(inputs, [scaled(inputs), scaled.dense(inputs)], name="tied")
    compressed = compress(models.randomize(model))
    with pytest.raises(ValueError, match="'dense' and 'scaled' share the weight '.*dense/kernel'"):
        kc.strip(compressed, like=model)


def test_weights_that_the_model_does_not_track_are_refused():
    hidden = layers.Dense(4, name="hidden")

    class Careless(keras.Model):
        def call(self, inputs):
            return hidden(inputs)

    inputs = np.ones((4, 6), "float32")
    model = Careless(name="careless")
    model(inputs)
    compressed = compress(model, inputs)
    assert compressed.weight_map == WeightMap([], {"hidden": [None, None]})
    with pytest.raises(ValueError, match="Layer 'hidden' has a weight 'kernel' that the original"):
        kc.strip(compressed, like=model)
