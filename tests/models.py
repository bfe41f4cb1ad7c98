"""A collection of small models, each with a structure that a tracer can stumble over.

`MODELS` maps a name to a function that makes the built model; `inputs_for` makes data for it.
Custom classes are registered, so that every model can be saved and loaded.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace

MODELS = {}  # name -> function that makes the model
OPAQUE = {  # model -> layer that stays whole, and a word of the reason
    "listed_weights": ("listed", "own"),
    "training_branch": ("branch", "training"),
    "data_dependent": ("dependent", "cannot be traced"),
    "training_constant": ("constant", "training"),
    "bidirectional_states": ("stateful", "states"),
    "time_distributed_of_unknown_length": ("wide", "unknown length"),
}


def collected(function):
    MODELS[function.__name__] = function
    return function


def registered(cls):
    return keras.saving.register_keras_serializable("keras_compress_tests")(cls)


def inputs_for(model, samples=4, seed=0):
    """Return random data in the structure of a model's inputs: whole numbers for integer ones."""
    random = np.random.default_rng(seed)

    def make(tensor):
        shape = (samples, *(dim or 5 for dim in tensor.shape[1:]))
        if tensor.dtype.startswith("int"):
            return random.integers(0, 9, shape).astype(tensor.dtype)
        return random.normal(size=shape).astype("float32")

    if getattr(model, "example", None) is not None:
        # An attribute of a model is a list of Keras' own, which JAX does not take.
        example = list(model.example) if isinstance(model.example, list) else model.example
        return keras.tree.map_structure(make, example)
    return keras.tree.map_structure(make, rebuild(trace(model)).input)


def randomize(model, seed=1):
    """Give every float weight a random value: a fresh model has zero biases and unit variances."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if keras.backend.standardize_dtype(variable.dtype).startswith(("float", "bfloat")):
            values = random.normal(0, 0.5, variable.shape)
            positive = "variance" in variable.path or "gamma" in variable.path
            variable.assign(np.abs(values) + 0.5 if positive else values)
    return model


def make(name):
    """Return the named model with random weights."""
    return randomize(MODELS[name]())


@registered
class ConvBlock(layers.Layer):
    """Convolution, normalization, shortcut and a `keras.ops` activation."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = layers.Conv2D(filters, 3, padding="same", use_bias=False, name="conv")
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.norm.build(self.conv.compute_output_shape(input_shape))

    def call(self, inputs, training=False):
        return ops.relu(self.norm(self.conv(inputs), training=training) + inputs)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"filters": self.filters}


@registered
class Classifier(keras.Model):
    """A subclassed model, built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(4, 3, padding="same", name="stem")
        self.first = ConvBlock(4, name="first")
        self.second = ConvBlock(4, name="second")
        self.pool = layers.GlobalAveragePooling2D(name="pool")
        self.dropout = layers.Dropout(0.5, name="dropout")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        x = self.second(self.first(self.stem(inputs)), training=training)
        return self.head(self.dropout(self.pool(x), training=training))


@registered
class TwoHeads(keras.Model):
    """A subclassed model with a dict of outputs and two positional inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left = layers.Dense(4, name="left")
        self.right = layers.Dense(4, name="right")
        self.head = layers.Dense(2, name="head")

    def call(self, inputs):
        a, b = inputs
        x = ops.relu(self.left(a) * self.right(b))
        return {"score": self.head(x), "hidden": x}


@registered
class BranchingModel(keras.Model):
    """A subclassed model that does something else in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, name="dense")

    def call(self, inputs, training=False):
        outputs = self.dense(inputs)
        return ops.tanh(outputs) if training else outputs


@registered
class ScaledDense(layers.Layer):
    """A layer with an inner layer and a weight of its own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units, name="dense")

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.factor = self.add_weight(shape=(self.units,), name="factor", initializer="ones")

    def call(self, inputs):
        return self.dense(inputs) * self.factor

    def get_config(self):
        return super().get_config() | {"units": self.units}


@registered
class ListedWeights(ScaledDense):
    """The same with its weight in a list, where tracing does not see it: must stay whole."""

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.factors = [self.add_weight(shape=(self.units,), name="factor", initializer="ones")]

    def call(self, inputs):
        return self.dense(inputs) * self.factors[0]


@registered
class TrainingBranch(layers.Layer):
    """A layer that runs other operations in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, training=False):
        outputs = self.dense(inputs)
        return ops.tanh(outputs) if training else outputs


@registered
class TrainingConstant(TrainingBranch):
    """A layer that runs the same operations in training, with another constant."""

    def call(self, inputs, training=False):
        return self.dense(inputs) * (2.0 if training else 1.0)


@registered
class DataDependent(TrainingBranch):
    """A layer whose Python code looks at values."""

    def call(self, inputs):
        outputs = self.dense(inputs)
        if not isinstance(outputs, keras.KerasTensor):
            return outputs
        raise ValueError("not on symbolic tensors")

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((*inputs.shape[:-1], 4), dtype=inputs.dtype)


@registered
class PatchedFunctional(keras.Model):
    """A Functional model whose subclass does more than its graph."""

    def call(self, inputs, training=None, mask=None):
        return ops.tanh(super().call(inputs, training=training, mask=mask))


@registered
def double(x):
    return x * 2.0


@collected
def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(4, 3, name="conv", use_bias=False),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.MaxPooling2D(name="pool"),
            layers.Flatten(name="flatten"),
            layers.Dropout(0.3, name="dropout"),
            layers.Dense(3, activation="softmax", name="head"),
        ],
        name="small",
    )


@collected
def unnamed_inputs():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    return keras.Model(inputs, layers.Dense(3)(layers.Add()(inputs)))


@collected
def residual():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="stem", activation="relu")(inputs)
    y = layers.Conv2D(4, 3, padding="same", name="body", use_bias=False)(x)
    y = layers.BatchNormalization(name="norm")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.ReLU(name="relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="residual")


@collected
def concat():
    inputs = keras.Input((8, 8, 3), name="image")
    a = layers.Conv2D(4, 1, name="left", activation="relu")(inputs)
    b = layers.Conv2D(2, 1, name="right")(inputs)
    x = layers.Concatenate(name="concat")([a, b])
    x = layers.Conv2D(3, 3, name="merge", activation="relu")(x)
    return keras.Model(inputs, layers.GlobalMaxPooling2D(name="pool")(x), name="concat_model")


@collected
def squeeze_excite():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv", activation="swish")(inputs)
    y = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    y = layers.Conv2D(2, 1, activation="swish", name="reduce")(y)
    y = layers.Conv2D(4, 1, activation="sigmoid", name="expand")(y)
    x = layers.Multiply(name="excite")([x, y])
    return keras.Model(inputs, layers.Conv2D(2, 1, name="project")(x), name="squeeze_excite")


@collected
def nested_functional():
    inner_input = keras.Input((6,), name="inner_input")
    hidden = layers.Dense(4, activation="relu", name="hidden")(inner_input)
    inner = keras.Model(inner_input, [hidden, layers.Dense(2, name="out")(hidden)], name="inner")
    inputs = keras.Input((6,), name="features")
    hidden, out = inner(layers.Dense(6, name="hidden")(inputs))
    return keras.Model(inputs, layers.Concatenate(name="join")([hidden, out]), name="outer")


@collected
def nested_sequential():
    block = keras.Sequential(
        [layers.Dense(5, name="dense"), layers.BatchNormalization(name="norm"), layers.ReLU()],
        name="block",
    )
    return keras.Sequential(
        [keras.Input((6,), name="features"), block, layers.Dense(2, name="dense")], name="stack"
    )


@collected
def nested_dict():
    parts = {"a": keras.Input((3,), name="a"), "b": keras.Input((4,), name="b")}
    merged = layers.Concatenate(name="join")([parts["b"], parts["a"]])
    inner = keras.Model(parts, {"sum": layers.Dense(2, name="sum")(merged), "all": merged})
    first, second = keras.Input((4,), name="first"), keras.Input((3,), name="second")
    outputs = inner({"b": first, "a": second})
    return keras.Model([first, second], [outputs["sum"], outputs["all"]], name="dict_inside")


@collected
def shared_layer():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    dense = layers.Dense(4, name="shared")
    x = layers.Concatenate(name="join")([dense(a), dense(b)])
    return keras.Model([a, b], layers.Dense(2, name="head")(x), name="siamese")


@collected
def shared_submodel():
    tower = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, activation="gelu", name="dense"),
            layers.Dense(4, name="out"),
        ],
        name="tower",
    )
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    x = layers.Multiply(name="product")([tower(a), tower(b)])
    return keras.Model([a, b], layers.Dense(1, name="head")(x), name="two_towers")


@collected
def list_inputs_outputs():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    x = layers.Dense(4, name="dense")(a)
    y = layers.Subtract(name="difference")([x, b])
    return keras.Model([a, b], [y, x], name="lists")


@collected
def dict_inputs_outputs():
    inputs = {"b": keras.Input((4,), name="b"), "a": keras.Input((6,), name="a")}
    x = layers.Dense(4, name="dense")(inputs["a"])
    y = layers.Average(name="mean")([x, inputs["b"]])
    return keras.Model(inputs, {"y": y, "x": x}, name="dicts")


@collected
def subclassed():
    model = Classifier(name="classifier")
    model(np.zeros((1, 8, 8, 3), "float32"))
    model.example = keras.KerasTensor((None, 8, 8, 3))
    return model


@collected
def subclassed_two_inputs():
    model = TwoHeads(name="two_heads")
    model([np.zeros((1, 6), "float32"), np.zeros((1, 5), "float32")])
    model.example = [keras.KerasTensor((None, 6)), keras.KerasTensor((None, 5))]
    return model


@collected
def subclassed_training_branch():
    model = BranchingModel(name="branching")
    model(np.zeros((1, 6), "float32"))
    model.example = keras.KerasTensor((None, 6))
    return model


@collected
def subclassed_blocks():
    inputs = keras.Input((8, 8, 4), name="image")
    x = ConvBlock(4, name="one")(inputs)
    x = ConvBlock(4, name="two")(x)
    return keras.Model(inputs, layers.Flatten(name="flatten")(x), name="blocks")


@collected
def keras_ops():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = ops.silu(x) * 0.5 + 1.0
    x = ops.concatenate([x, ops.relu(x)], axis=-1)
    x = ops.mean(ops.reshape(x, (-1, 36, 8)), axis=1)
    x = ops.transpose(ops.expand_dims(x, 1), (0, 2, 1))[:, :, 0]
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="operations")


@collected
def separable():
    inputs = keras.Input((8, 8, 3), name="image")
    layer = layers.SeparableConv2D(
        4, 3, strides=2, padding="same", depth_multiplier=2, activation="relu", name="separable"
    )
    x = layers.Reshape((16, 4), name="reshape")(layer(inputs))
    x = layers.SeparableConv1D(3, 3, use_bias=False, name="separable1d")(x)
    return keras.Model(inputs, x, name="separables")


@collected
def depthwise():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(6.0, name="relu6")(x)
    return keras.Model(inputs, layers.Conv2D(3, 1, name="pointwise")(x), name="depthwise_model")


@collected
def tokens():
    inputs = keras.Input((5,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 6, name="embedding")(inputs)
    x = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), name="project")(x)
    x = layers.Reshape((5, 8), name="reshape")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="token_model")


@collected
def attention():
    inputs = keras.Input((5, 6), name="sequence")
    x = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    x = layers.LayerNormalization(name="norm")(layers.Add(name="add")([inputs, x]))
    return keras.Model(inputs, layers.Dense(6, activation="gelu", name="mlp")(x), name="encoder")


@collected
def recurrent():
    inputs = keras.Input((5,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 4, mask_zero=True, name="embedding")(inputs)
    x = layers.LSTM(3, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="recurrent")


@collected
def lambda_layer():
    inputs = keras.Input((6,), name="features")
    x = layers.Lambda(double, output_shape=(6,), name="double")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="with_lambda")


def _around(layer, name):
    inputs = keras.Input((6,), name="features")
    x = layer(layers.Dense(4, name="before")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="after")(x), name=name)


@collected
def own_weights():
    return _around(ScaledDense(4, name="scaled"), "own_weights")


@collected
def listed_weights():
    return _around(ListedWeights(4, name="listed"), "listed_weights")


@collected
def training_branch():
    return _around(TrainingBranch(name="branch"), "training_branch")


@collected
def training_constant():
    return _around(TrainingConstant(name="constant"), "training_constant")


@collected
def data_dependent():
    return _around(DataDependent(name="dependent"), "data_dependent")


@collected
def functional_subclass():
    inputs = keras.Input((4,), name="hidden")
    inner = PatchedFunctional(inputs, layers.Dense(4, name="dense")(inputs), name="patched")
    return _around(inner, "functional_subclass")


@collected
def always_training():
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(4, name="dense")(inputs)
    x = layers.BatchNormalization(name="norm")(x, training=False)
    block = keras.Sequential([layers.Dense(4), layers.BatchNormalization()], name="frozen")
    return keras.Model(inputs, block(x, training=False), name="fixed_modes")


@collected
def passed_through():
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(4, name="dense")(inputs)
    return keras.Model(inputs, [inputs, x, x], name="passed_through")
