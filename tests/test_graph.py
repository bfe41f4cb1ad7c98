"""Tracing, the graph's view of a model, rebuilding and FLOPs."""

import json

import awkward_models
import keras
import masked_models
import models
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers, ops

from keras_compress.graph.flops import flops, total_flops
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import Role, copy_operation, role_of
from keras_compress.layers import FakeQuantize

every_model = pytest.mark.parametrize("name", models.MODELS)


def run(model, inputs, **kwargs):
    return [numpy(leaf) for leaf in keras.tree.flatten(model(inputs, **kwargs))]


def assert_same(actual, expected, tolerance=1e-6):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + abs(b).max()))


def top_level_names(model):
    inner = [layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]
    composite = (keras.Model, layers.MultiHeadAttention, layers.GroupQueryAttention)
    composite += (layers.SeparableConv1D, awkward_models.Stack)
    composite += (masked_models.EncoderBlock, masked_models.ZeroWhereMasked)
    composite += (layers.SeparableConv2D, models.ConvBlock, models.ScaledDense)
    composite += (layers.TimeDistributed, layers.Bidirectional)
    return [layer.name for layer in inner if not isinstance(layer, composite)]


@every_model
def test_rebuilt_model_computes_the_same(name):
    model = models.make(name)
    inputs = models.inputs_for(model)
    weights = model.get_weights()
    expected = run(model, inputs, training=False)
    rebuilt = rebuild(trace(model))

    assert_same(run(rebuilt, inputs, training=False), expected)
    assert_same(run(model, inputs, training=False), expected, tolerance=0)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@every_model
def test_names_are_kept_and_unique(name):
    model = models.make(name)
    rebuilt = rebuild(trace(model))
    names = [layer.name for layer in rebuilt.layers]
    edges = [edge.name for edge in trace(model).edges]

    assert rebuilt.name == model.name
    assert len(set(names)) == len(names)
    assert len(set(edges)) == len(edges)
    if not isinstance(model, models.BranchingModel):
        assert set(top_level_names(model)) <= set(names)
    assert not set(map(id, model.variables)) & set(map(id, rebuilt.variables))


@every_model
def test_the_original_can_still_be_copied(name):
    model = models.make(name)
    before = json.dumps(keras.saving.serialize_keras_object(model), sort_keys=True)
    rebuild(trace(model))
    assert json.dumps(keras.saving.serialize_keras_object(model), sort_keys=True) == before


@every_model
def test_a_rebuilt_model_is_traced_the_same(name):
    graph = trace(models.make(name))
    again = trace(rebuild(graph))
    opaque = {node.name for node in graph.nodes if node.reason}

    def described(nodes):
        return sorted((node.name, type(node.op).__name__) for node in nodes)

    if not opaque:
        assert described(again.nodes) == described(graph.nodes)
    assert len(again.nodes) >= len(graph.nodes)


@pytest.mark.parametrize("name", models.OPAQUE)
def test_what_cannot_be_traced_stays_whole_with_its_reason(name):
    layer, word = models.OPAQUE[name]
    nodes = {node.name: node for node in trace(models.make(name)).nodes}
    assert word in nodes[layer].reason
    assert nodes[layer].role is Role.FLOAT
    assert {"before", "after"} <= set(nodes)


def test_subclassed_model_with_a_training_branch_stays_whole():
    (node,) = trace(models.make("subclassed_training_branch")).nodes
    assert "training" in node.reason


def test_subclassed_model_becomes_primitives():
    graph = trace(models.make("subclassed"))
    kinds = [type(node.op).__name__ for node in graph.nodes]
    block = ["Conv2D", "BatchNormalization", "Add", "Relu"]
    assert kinds == ["Conv2D", *block, *block, "GlobalAveragePooling2D", "Dropout", "Dense"]
    names = [node.name for node in graph.nodes]
    assert {"stem", "first-conv", "second-conv", "second-norm", "head"} <= set(names)


def test_attention_becomes_four_projections():
    nodes = trace(models.make("attention")).nodes
    projections = [node for node in nodes if isinstance(node.op, layers.EinsumDense)]
    names = ["query", "key", "value", "attention_output"]
    assert sorted(node.name for node in projections) == sorted(f"attention-{n}" for n in names)


def test_separable_convolution_is_split():
    names = list(trace(models.make("separable")).layer_nodes())
    assert names[:2] == ["separable-depthwise", "separable-pointwise"]


def test_shared_operations_are_one_layer_with_two_nodes():
    graph = trace(models.make("shared_submodel"))
    dense = [node for node in graph.nodes if node.name == "tower-dense"]
    assert len(dense) == 2
    assert dense[0].op is dense[1].op
    rebuilt = rebuild(graph)
    assert [layer.name for layer in rebuilt.layers].count("tower-dense") == 1


@pytest.mark.parametrize("name", ["subclassed", "subclassed_blocks", "always_training"])
def test_training_mode_reaches_traced_layers(name):
    """`call(..., training=False)` is a default, not a decision."""
    model = models.make(name)
    rebuilt = rebuild(trace(model))
    inputs = models.inputs_for(model, samples=8)
    run(model, inputs, training=True)
    run(rebuilt, inputs, training=True)
    pairs = zip(statistics(model), statistics(rebuilt), strict=True)
    assert all(np.allclose(original, copied, atol=1e-6) for original, copied in pairs)


def statistics(model):
    """The moving statistics of a model, sorted by the names of their layers."""
    moving = [w for w in model.weights if "moving" in w.path]
    return [
        numpy(w) for w in sorted(moving, key=lambda w: w.path.replace("-", "/").split("/")[-3:])
    ]


def test_dropout_is_active_in_training_only():
    rebuilt = rebuild(trace(models.make("sequential")))
    inputs = models.inputs_for(rebuilt)
    assert_same(run(rebuilt, inputs), run(rebuilt, inputs, training=False), tolerance=0)
    assert abs(run(rebuilt, inputs, training=True)[0] - run(rebuilt, inputs)[0]).max() > 1e-3


def test_structures_of_inputs_and_outputs_are_kept():
    model = models.make("dict_inputs_outputs")
    rebuilt = rebuild(trace(model))
    assert set(rebuilt.input) == {"a", "b"} and set(rebuilt.output) == {"x", "y"}
    outputs = rebuilt({"a": np.ones((1, 6)), "b": np.ones((1, 4))})
    assert set(outputs) == {"x", "y"}


def test_unnamed_inputs_keep_their_names():
    model = models.make("unnamed_inputs")
    names = [tensor.name for tensor in model.inputs]
    assert [tensor.name for tensor in rebuild(trace(model)).inputs] == names


@pytest.mark.parametrize("value", [None, "model", layers.Dense(2)], ids=str)
def test_only_keras_models_are_traced(value):
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        trace(value)


@pytest.mark.parametrize("make", [models.Classifier, lambda: keras.Sequential([layers.Dense(2)])])
def test_only_built_models_are_traced(make):
    with pytest.raises(ValueError, match="Expected a built model"):
        trace(make())


def test_graph_runs_on_values():
    model = models.make("residual")
    graph = trace(model)
    inputs = models.inputs_for(model)
    values = graph.run([ops.convert_to_tensor(inputs)], lambda node, *a, **k: node.op(*a, **k))
    assert_same([numpy(values[edge]) for edge in graph.outputs], run(model, inputs))
    assert set(values) == set(graph.edges)


def test_edges_know_producer_and_consumers():
    nodes = trace(models.make("residual")).layer_nodes()
    stem = nodes["stem"].output
    assert stem.producer is nodes["stem"]
    assert stem.consumers == [nodes["body"], nodes["add"]]
    assert nodes["head"].output.consumers == []
    assert repr(nodes["stem"]) == "<Node stem: Conv2D>"
    assert repr(stem) == "<Edge stem (None, 8, 8, 4)>"


@pytest.mark.parametrize(
    "op, role",
    [
        (layers.Conv2D(1, 1), Role.WEIGHTED),
        (layers.Embedding(2, 2), Role.WEIGHTED),
        (layers.Add(), Role.ARITHMETIC),
        (layers.BatchNormalization(), Role.NORMALIZATION),
        (layers.ReLU(), Role.ACTIVATION),
        (layers.MaxPooling2D(), Role.MOVEMENT),
        (layers.UpSampling2D(), Role.FLOAT),
        (FakeQuantize(), Role.FAKE_QUANTIZE),
        (layers.LSTM(2), Role.WEIGHTED),
        (layers.ConvLSTM1D(2, 3), Role.FLOAT),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_roles(op, role):
    assert role_of(op) is role


def test_a_users_subclass_of_a_supported_layer_is_left_alone():
    class Odd(layers.Dense):
        def call(self, inputs):
            return super().call(inputs) * 2

    assert role_of(Odd(2)) is Role.FLOAT


def test_swap_is_asked_once_per_operation():
    asked = []
    rebuild(trace(models.make("shared_layer")), swap=lambda node: asked.append(node.name))
    assert asked == ["shared", "join", "head"]


def test_a_layer_without_a_configuration_is_copied():
    class Closed(layers.Layer):
        def __init__(self, factor):
            super().__init__(name="closed")
            self.factor = factor

        def build(self, input_shape):
            self.offset = self.add_weight(shape=(), initializer="ones")

        def call(self, inputs):
            return inputs * self.factor + self.offset

    inputs = keras.Input((3,))
    layer = Closed(3.0)
    model = keras.Model(inputs, layer(inputs))
    layer.offset.assign(5.0)
    rebuilt = rebuild(trace(model))
    x = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(run(rebuilt, x)[0], 8 * x)
    layer.offset.assign(0.0)
    np.testing.assert_array_equal(run(rebuilt, x)[0], 8 * x)
    np.testing.assert_array_equal(run(model, x)[0], 3 * x)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapted_normalization_is_copied(whole):
    class Whole(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Normalization()

        def build(self, input_shape):
            self.inner.build(input_shape)

        def call(self, inputs, training=False):
            return ops.tanh(self.inner(inputs)) if training else self.inner(inputs)

    inputs = keras.Input((4,))
    layer = Whole() if whole else layers.Normalization()
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32")
    (layer.inner if whole else layer).adapt(x)
    (expected,) = run(model, x)
    assert_same(run(rebuild(trace(model)), x), [expected])
    assert abs(expected.mean()) < 1e-3


def test_a_lambda_keeps_its_function():
    factor = 3.0
    inputs = keras.Input((2,))
    scaled = layers.Lambda(lambda x: x * factor, output_shape=(2,), name="scaled")(inputs)
    rebuilt = rebuild(trace(keras.Model(inputs, scaled)))
    np.testing.assert_array_equal(run(rebuilt, np.ones((1, 2)))[0], [[3.0, 3.0]])


def test_a_layer_that_cannot_be_made_again_is_named():
    class Secretive(layers.Layer):
        def get_config(self):
            raise NotImplementedError("no configuration")

        def call(self, inputs, training=False):
            return 2 * inputs if training else inputs  # so that it cannot be traced either

    inputs = keras.Input((2,))
    model = keras.Model(inputs, Secretive(name="secretive")(inputs))
    with pytest.raises(ValueError, match="'secretive'.*cannot be copied.*no configuration"):
        rebuild(trace(model))


def test_bare_operations_are_copied():
    inputs = keras.Input((3,))
    (node,) = trace(keras.Model(inputs, ops.relu(inputs))).nodes
    twin = copy_operation(node.op, "again")
    assert twin is not node.op and twin.name == "again" and node.op.name != "again"
    x = ops.convert_to_tensor([[-1.0, 2.0]])
    np.testing.assert_array_equal(numpy(twin(x)), [[0.0, 2.0]])


def flops_of(layer, shape, dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype)
    (node,) = trace(keras.Model(inputs, layer(inputs))).nodes
    return flops(node)


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (layers.Dense(5), (7,), 2 * 7 * 5),
        (layers.Dense(5), (3, 7), 2 * 7 * 5 * 3),
        (layers.Conv2D(5, 3, padding="same"), (8, 8, 4), 2 * 9 * 4 * 5 * 64),
        (layers.Conv2D(6, 3, strides=2, padding="same"), (8, 8, 4), 2 * 9 * 4 * 6 * 16),
        (layers.Conv2D(6, 3, groups=2), (8, 8, 4), 2 * 9 * 2 * 6 * 36),
        (layers.Conv1D(5, 3), (8, 4), 2 * 3 * 4 * 5 * 6),
        (layers.Conv3D(5, 2), (4, 4, 4, 3), 2 * 8 * 3 * 5 * 27),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), 2 * 9 * 4 * 2 * 36),
        (layers.Conv2DTranspose(5, 3, strides=2), (8, 8, 4), 2 * 9 * 4 * 5 * 64),
        (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (5, 7), 2 * 7 * 6 * 5),
        (layers.EinsumDense("abc,cd->abd", (None, 3)), (5, 7), 2 * 7 * 3 * 5),
        (layers.EinsumDense("abcd,cde->abe", (None, 6)), (5, 2, 3), 2 * 2 * 3 * 6 * 5),
        (layers.BatchNormalization(), (8, 8, 4), 256),
        (layers.ReLU(), (8, 8, 4), 256),
        (layers.Flatten(), (8, 8, 4), 0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_flops_have_closed_forms(layer, shape, expected):
    assert flops_of(layer, shape) == expected


def test_an_embedding_computes_nothing():
    assert flops_of(layers.Embedding(9, 4), (5,), "int32") == 0


def test_flops_of_a_matrix_product():
    a, b = keras.Input((4, 6)), keras.Input((6, 3))
    (node,) = trace(keras.Model([a, b], ops.matmul(a, b))).nodes
    assert flops(node) == 2 * 4 * 6 * 3


def test_total_flops():
    model = models.make("residual")
    convolutions = 2 * 9 * 3 * 4 * 64 + 2 * 9 * 4 * 4 * 64
    assert total_flops(trace(model)) == convolutions + 3 * 256 + 4 + 2 * 4 * 3
