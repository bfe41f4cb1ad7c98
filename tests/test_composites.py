"""Composite layers that do more than call their inner layers are traced all the same."""

import keras
import models
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers, ops

import keras_compress as kc
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.traced_layers import BatchSized, Parameter
from keras_compress.graph.walk import Role

CONFIG = {"compression": {"algorithm": "quantization"}}


class ClassToken(layers.Layer):
    """Puts a learned vector before a sequence, and asks for the size of the batch to do so."""

    def build(self, input_shape):
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), name="token")
        self.dense = layers.Dense(input_shape[-1], name="dense")
        self.dense.build(input_shape)

    def call(self, inputs):
        batch, _, size = ops.shape(inputs)
        token = ops.tile(self.token, (batch, 1, 1))
        flat = ops.reshape(self.dense(inputs), (batch, -1, size))
        return ops.concatenate([token, flat], axis=1)


class Causal(layers.Layer):
    """Makes a constant of the size of the batch, as masks often are."""

    def build(self, input_shape):
        self.dense = layers.Dense(4, name="dense")
        self.dense.build(input_shape)

    def call(self, inputs):
        batch, length = ops.shape(inputs)[:2]
        mask = ops.broadcast_to(ops.reshape(ops.arange(length), (1, length, 1)), (batch, length, 4))
        return self.dense(inputs) + ops.flip(ops.cast(mask, "float32"), axis=1)


class Pair(layers.Layer):
    """Returns something that is no tensor beside its result."""

    def build(self, input_shape):
        self.factor = self.add_weight(shape=(), name="factor", initializer="ones")
        self.dense = layers.Dense(input_shape[-1], name="dense")
        self.dense.build(input_shape)

    def call(self, inputs, training=False):
        return self.dense(inputs) * self.factor, None


class Pairs(layers.Layer):
    """Calls two layers of which each returns something that is no tensor."""

    def build(self, input_shape):
        self.pairs = [Pair(name="one"), Pair(name="two")]
        for pair in self.pairs:
            pair.build(input_shape)

    def call(self, inputs):
        for pair in self.pairs:
            inputs, _ = pair(inputs)
        return inputs


class Both(layers.Layer):
    """Gives two results."""

    def build(self, input_shape):
        self.used = layers.Dense(4, name="used")
        self.unused = layers.Dense(4, name="unused")
        self.used.build(input_shape)
        self.unused.build(input_shape)

    def call(self, inputs):
        return self.used(inputs), self.unused(inputs)


class Unconfigured(layers.Layer):
    """Cannot be made again from its configuration."""

    def __init__(self, factor):
        super().__init__(name="unconfigured")
        self.factor = factor

    def get_config(self):
        return super().get_config() | {"unknown": self.factor}

    def call(self, inputs):
        return inputs * self.factor


class Overlap(ClassToken):
    """Computes with the size of the batch."""

    def call(self, inputs):
        return self.dense(inputs) * ops.cast(ops.shape(inputs)[0], "float32")


def around(layer, length=3):
    inputs = keras.Input((length, 4), name="sequence")
    return keras.Model(inputs, layers.Dense(2, name="head")(layer(inputs)))


def data(samples, length=3):
    return np.random.default_rng(samples).normal(size=(samples, length, 4)).astype("float32")


def randomize(model):
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.normal(size=weight.shape))
    return model


@pytest.mark.parametrize("cls", [ClassToken, Causal, Pairs, lambda: Unconfigured(3.0)])
def test_traced_to_the_same_numbers_for_any_batch(cls):
    model = randomize(around(cls()))
    graph = trace(model)
    assert not any(node.reason for node in graph.nodes)
    rebuilt = rebuild(graph)
    for samples in (1, 3, 5):
        expected = numpy(model(data(samples)))
        np.testing.assert_allclose(numpy(rebuilt(data(samples))), expected, atol=1e-6)


def test_own_variables_become_parameters():
    nodes = trace(around(ClassToken(name="embed"))).layer_nodes()
    parameter = nodes["embed-token"]
    assert isinstance(parameter.op, Parameter) and parameter.role is Role.PARAMETER
    assert parameter.op.trainable_variables
    assert isinstance(nodes["embed-tile"].op, BatchSized)
    assert nodes["embed-reshape"].role is Role.MOVEMENT
    assert [edge.name for edge in nodes["embed-tile"].carried] == ["embed-token"]


def test_layers_of_opened_layers_are_named_by_their_path():
    names = trace(around(Pairs(name="pairs"))).layer_nodes()
    assert {"pairs-one-dense", "pairs-two-dense"} <= set(names)


def test_what_computes_with_the_size_of_the_batch_stays_whole():
    nodes = trace(around(Overlap(name="overlap"))).layer_nodes()
    assert "size of the batch" in nodes["overlap"].reason


def test_what_no_output_depends_on_is_left_out():
    inputs = keras.Input((3, 4))
    used, _ = Both(name="both")(inputs)
    names = trace(keras.Model(inputs, layers.Dense(2, name="head")(used))).layer_nodes()
    assert list(names) == ["both-used", "head"]


def test_parameters_train_save_and_strip(tmp_path):
    model = randomize(around(ClassToken(name="embed")))
    compressed = kc.compress_model(model, CONFIG, data=data(8), verbose=False)
    before = numpy(compressed.get_layer("embed-token").value)
    compressed.compile("sgd", "mse")
    compressed.fit(data(8), np.ones((8, 4, 2)), verbose=0)
    assert abs(numpy(compressed.get_layer("embed-token").value) - before).max() > 0
    expected = numpy(compressed(data(5)))
    compressed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(data(5))), expected)
    np.testing.assert_array_equal(numpy(kc.strip(compressed)(data(5))), expected)


def test_a_nested_model_is_traced_for_the_sizes_it_is_called_on():
    inner_input = keras.Input((None, 4))
    inner = keras.Model(inner_input, Causal(name="causal")(inner_input), name="inner")
    outer = around(inner)
    names = trace(outer).layer_nodes()
    assert "inner-causal-dense" in names
    assert trace(inner).layer_nodes()["causal"].reason  # of unknown length


def test_a_subclass_that_adds_no_method_is_its_base():
    class Tokens(layers.ReversibleEmbedding):
        """Renamed."""

    tokens = keras.Input((3,), dtype="int32")
    outputs = layers.Dense(2, name="head")(Tokens(9, 4, name="tokens")(tokens))
    model = keras.Model(tokens, outputs)
    compressed = kc.compress_model(model, CONFIG, data=np.ones((4, 3), "int32"), verbose=False)
    embedding = compressed.get_layer("tokens")
    assert type(embedding).__name__ == "FakeQuantReversibleEmbedding"
    assert len(np.unique(embedding.effective_weight("embeddings")[:, 0])) > 1
    assert type(kc.strip(compressed).get_layer("tokens")) is layers.ReversibleEmbedding


def test_a_tied_embedding_multiplies_in_integers():
    tied, untied = (
        kc.plan(models.make(f"{name}_embedding"), CONFIG) for name in ("tied", "untied")
    )
    assert "embedding" in {reader for entry in tied.edges for reader in entry.readers}
    assert "embedding" not in {entry.layer for entry in tied.untouched}
    scales = {plan: plan.weights[0].transforms[0]().axis for plan in (tied, untied)}
    assert (scales[tied], scales[untied]) == ((-2,), (-1,))
    assert "7-bit" in tied.weights[0].description and "7-bit" not in untied.weights[0].description
    (entry,) = (entry for entry in untied.untouched if entry.layer == "embedding")
    products = 6 * 2 * 8 * (8 + 9)  # of the dense layer and of the output
    assert "weights of its own" in entry.reason and entry.flops == 6 * 2 * 8 * 9
    assert entry.share == pytest.approx(entry.flops / products, rel=0.1)


def test_what_prepares_the_input_of_a_softmax_stays_float():
    x = keras.Input((5, 8), name="x")
    bias = keras.Input((5, 5), name="bias")
    scores = ops.softmax(ops.add(ops.matmul(x, ops.transpose(x, (0, 2, 1))), bias))
    model = keras.Model([x, bias], layers.Dense(2, name="head")(ops.matmul(scores, x)))
    edges = {edge for entry in kc.plan(model, CONFIG).edges for edge in entry.edges}
    assert "bias" not in edges and "x" in edges
