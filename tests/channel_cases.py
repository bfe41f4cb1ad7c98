"""Small models, one per rule of how channels move, with the groups of channels derived by hand.

`CASES` maps a name to a `Case`. Every head is a `Dense` named "head", whose three units the model
gives out; `expected` is about all other groups.
"""

import dataclasses
from collections.abc import Callable

import keras
import models
import numpy as np
import pytest
from backend_helpers import BACKEND
from keras import layers, ops
from models import registered

CASES = {}
GIVEN_OUT = "the model gives it out"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its groups of channels.

    Attributes:
        build: function that makes the model.
        expected: {name of a group and its further layers: size, or (size, why all are kept)}.
        skip: why it cannot run on TensorFlow; empty where it can.
    """

    build: Callable
    expected: dict
    skip: str = ""

    @property
    def prunes(self):
        """Whether any channel can be removed."""
        return any(not isinstance(group, tuple) for group in self.expected.values())


def case(expected, head=True, skip=""):
    def collect(function):
        groups = expected | ({"head": (3, GIVEN_OUT)} if head else {})
        CASES[function.__name__] = Case(function, groups, skip)
        return function

    return collect


def unknown(size, name, kind):
    return size, f"how they move through '{name}' ({kind}) is not known"


def image(channels=3, size=8):
    return keras.Input((size, size, channels), name="image")


def rows(length=6, channels=5):
    return keras.Input((length, channels), name="rows")


def vector(channels=5):
    return keras.Input((channels,), name="vector")


def ids(length=6):
    return keras.Input((length,), dtype="int32", name="ids")


def conv(filters, name, kernel=3, **kwargs):
    return layers.Conv2D(filters, kernel, padding="same", name=name, **kwargs)


def dense(units, name, **kwargs):
    return layers.Dense(units, name=name, **kwargs)


def model(inputs, x):
    """Close a model: the mean over all axes but the last, and the head."""
    pools = {
        3: layers.GlobalAveragePooling1D,
        4: layers.GlobalAveragePooling2D,
        5: layers.GlobalAveragePooling3D,
    }
    if len(x.shape) in pools:
        x = pools[len(x.shape)](name="pool")(x)
    return keras.Model(inputs, dense(3, "head")(x), name="case")


# Convolutions


@case({"a": 8, "b": 6})
def conv1d():
    inputs = rows()
    x = layers.Conv1D(8, 3, activation="relu", name="a")(inputs)
    return model(inputs, layers.Conv1D(6, 2, strides=2, use_bias=False, name="b")(x))


@case({"a": 8, "b": 6})
def conv2d():
    inputs = image()
    x = conv(8, "a", activation="swish")(inputs)
    return model(inputs, conv(6, "b", strides=2, activation="sigmoid")(x))


@case({"a": 8, "b": 6})
def conv3d():
    inputs = keras.Input((4, 4, 4, 2), name="volume")
    x = layers.Conv3D(8, 2, activation="relu", name="a")(inputs)
    return model(inputs, layers.Conv3D(6, 2, name="b")(x))


@case({"a": 8, "b": 6})
def transposed1d():
    inputs = rows()
    x = layers.Conv1DTranspose(8, 3, strides=2, activation="relu", name="a")(inputs)
    return model(inputs, layers.Conv1DTranspose(6, 3, name="b")(x))


@case({"a": 8, "b": 6})
def transposed2d():
    inputs = image()
    x = layers.Conv2DTranspose(8, 3, strides=2, activation="relu", name="a")(inputs)
    return model(inputs, layers.Conv2DTranspose(6, 3, name="b")(x))


@case({"a": 8, "b": 6})
def transposed3d():
    inputs = keras.Input((3, 3, 3, 2), name="volume")
    x = layers.Conv3DTranspose(8, 2, activation="relu", name="a")(inputs)
    return model(inputs, layers.Conv3DTranspose(6, 2, name="b")(x))


@case({"a": 6, "b": 5})
def depthwise1d():
    inputs = rows()
    x = layers.Conv1D(6, 3, activation="relu", name="a")(inputs)
    x = layers.DepthwiseConv1D(3, depth_multiplier=2, activation="sigmoid", name="depthwise")(x)
    return model(inputs, layers.Conv1D(5, 1, name="b")(x))


@case({"a": 6, "b": 5})
def depthwise2d():
    inputs = image()
    x = conv(6, "a", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, name="depthwise")(x)
    x = layers.BatchNormalization(name="norm")(x)
    return model(inputs, conv(5, "b", 1)(layers.ReLU(6.0, name="relu6")(x)))


@case({"b": 5})
def depthwise_on_the_input():
    inputs = image()
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, name="depthwise")(inputs)
    return model(inputs, conv(5, "b", 1)(x))


@case({"a": 4, "separable-pointwise": 6})
def separable2d():
    inputs = image()
    x = conv(4, "a", activation="relu")(inputs)
    layer = layers.SeparableConv2D(
        6, 3, strides=2, depth_multiplier=2, activation="relu", name="separable"
    )
    return model(inputs, layer(x))


@case({"a": 4, "separable-pointwise": 6})
def separable1d():
    inputs = rows()
    x = layers.Conv1D(4, 3, activation="relu", name="a")(inputs)
    return model(inputs, layers.SeparableConv1D(6, 3, use_bias=False, name="separable")(x))


@case({"a": 2, "grouped": 3})
def grouped():
    """8 channels in 4 groups of 2, 12 filters in groups of 3: the same place in each goes."""
    inputs = image()
    x = conv(8, "a", activation="relu")(inputs)
    return model(inputs, conv(12, "grouped", groups=4)(x))


@case({"grouped": 3})
def grouped_on_the_input():
    inputs = image(4)
    return model(inputs, conv(6, "grouped", groups=2, activation="relu")(inputs))


@case({"a": 6})
def one_channel_per_group():
    inputs = image()
    x = conv(6, "a", activation="relu")(inputs)
    return model(inputs, conv(12, "grouped", groups=6)(x))


@case({"b": 5})
def one_channel_per_group_on_the_input():
    inputs = image()
    return model(inputs, conv(5, "b")(conv(6, "grouped", groups=3)(inputs)))


@case({"a": 6, "b": 5}, skip="TensorFlow has no such convolution on the CPU")
def channels_first():
    first = {"data_format": "channels_first"}
    inputs = keras.Input((3, 8, 8), name="image")
    x = conv(6, "a", activation="relu", **first)(inputs)
    x = layers.BatchNormalization(axis=1, name="norm")(x)
    x = layers.MaxPooling2D(2, name="max", **first)(x)
    x = layers.DepthwiseConv2D(2, name="depthwise", **first)(x)
    y = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze", **first)(x)
    x = conv(5, "b", **first)(layers.Multiply(name="gate")([x, ops.sigmoid(y)]))
    x = layers.GlobalMaxPooling2D(name="pool", **first)(x)
    return keras.Model(inputs, dense(3, "head")(x), name="case")


@case({"a": (4, "'a' is called on tensors of other channels")})
def a_layer_called_on_the_input_and_on_channels():
    inputs = image(4)
    layer = conv(4, "a", activation="relu")
    return model(inputs, layer(layer(inputs)))


@case({"a": (4, "'norm' is called on tensors of other channels")})
def a_norm_called_on_the_input_and_on_channels():
    inputs = image(4)
    norm = layers.BatchNormalization(name="norm")
    return model(inputs, norm(conv(4, "a")(norm(inputs))))


# Products


@case({"a": 8, "b": 6})
def dense_layers():
    inputs = vector()
    return model(inputs, dense(6, "b", use_bias=False)(dense(8, "a", activation="gelu")(inputs)))


@case({"a": 8, "b": 6})
def dense_on_rows():
    inputs = rows()
    return model(inputs, dense(6, "b")(dense(8, "a", activation="tanh")(inputs)))


def einsum(equation, output_shape, name, bias=None):
    return layers.EinsumDense(equation, output_shape, bias_axes=bias, name=name)


@case({"a": 8, "b": 6})
def einsum_like_dense():
    inputs = rows()
    x = ops.relu(einsum("abc,cd->abd", (6, 8), "a", "d")(inputs))
    return model(inputs, einsum("abc,cd->abd", (None, 6), "b")(x))


@case({"a": 8, "b": 6})
def einsum_with_ellipsis():
    inputs = rows()
    x = ops.relu(einsum("...c,cd->...d", 8, "a", "d")(inputs))
    return model(inputs, einsum("...c,cd->...d", 6, "b", "d")(x))


@case({"heads": 4, "join": 6})
def einsum_heads_and_projection():
    inputs = rows()
    x = ops.relu(einsum("abc,cde->abde", (None, 4, 3), "heads", "de")(inputs))
    return model(inputs, einsum("abde,dec->abc", (None, 6), "join", "c")(x))


@case({"a": 8})
def einsum_over_rows():
    """Channels pass through a product over another axis, as in an MLP mixer."""
    inputs = rows()
    x = dense(8, "a", activation="relu")(inputs)
    return model(inputs, einsum("abc,bd->adc", (7, 8), "mix", "d")(x))


@case({"a": 8})
def einsum_scale():
    inputs = rows()
    x = dense(8, "a", activation="relu")(inputs)
    return model(inputs, einsum("abc,c->abc", (None, 8), "scale", "c")(x))


@case({"a": (8, "'sum' sums over them")})
def einsum_sum():
    inputs = rows(channels=5)
    x = einsum("abc,bd->ad", (3,), "sum")(dense(8, "a")(inputs))
    return model(inputs, x)


@case({"q": (4, "'einsum' sums over them"), "k": (4, "'einsum' sums over them"), "v": 4, "b": 6})
def products_of_tensors():
    inputs = rows()
    q, k, v = (dense(4, name)(inputs) for name in "qkv")
    scores = ops.einsum("bik,bjk->bij", q, k)
    x = ops.matmul(ops.softmax(scores, axis=-1), v)
    return model(inputs, dense(6, "b")(x))


@case({"embedding": 8, "a": 6})
def embedding():
    inputs = ids()
    x = layers.Embedding(9, 8, name="embedding")(inputs)
    return model(inputs, dense(6, "a")(x))


@case({"embedding + a": 8}, head=False)
def tied_embedding():
    inputs = ids()
    layer = layers.ReversibleEmbedding(9, 8, name="embedding")
    x = dense(8, "a", activation="gelu")(layer(inputs))
    return keras.Model(inputs, layer(x, reverse=True), name="case")


UNTIED = "'embedding' multiplies by weights of its own"


@case({"embedding": (8, UNTIED), "a": 6, "b": (8, UNTIED)}, head=False)
def untied_embedding():
    inputs = ids()
    layer = layers.ReversibleEmbedding(9, 8, tie_weights=False, name="embedding")
    x = dense(6, "a", activation="gelu")(layer(inputs))
    return keras.Model(inputs, layer(dense(8, "b")(x), reverse=True), name="case")


# Recurrent layers


@case({"a": 6, "b": 5})
def lstm():
    inputs = rows()
    x = layers.LSTM(6, return_sequences=True, name="a")(inputs)
    return model(inputs, layers.LSTM(5, name="b")(x))


@case({"a": 6, "b": 5})
def gru():
    inputs = rows()
    x = layers.GRU(6, return_sequences=True, name="a")(inputs)
    return model(inputs, layers.GRU(5, reset_after=False, go_backwards=True, name="b")(x))


@case({"a": 6, "b": 5})
def simple_rnn():
    inputs = rows()
    x = layers.SimpleRNN(6, return_sequences=True, activation="sigmoid", name="a")(inputs)
    return model(inputs, layers.SimpleRNN(5, use_bias=False, name="b")(x))


@case({"embedding": 7, "a": 6})
def masked_steps():
    inputs = ids()
    x = layers.Embedding(9, 7, mask_zero=True, name="embedding")(inputs)
    return model(inputs, layers.LSTM(6, name="a")(x))


@case({"a": 7, "both-forward_lstm": 4, "both-backward_lstm": 4, "b": 6})
def bidirectional():
    inputs = rows()
    x = dense(7, "a")(inputs)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both")(x)
    return model(inputs, dense(6, "b")(x))


@case({"both-forward_gru + both-backward_gru": 4})
def bidirectional_sum():
    inputs = rows()
    layer = layers.Bidirectional(layers.GRU(4, name="gru"), merge_mode="sum", name="both")
    return model(inputs, layer(inputs))


@case({"a + gru": 6})
def initial_state():
    inputs = rows()
    state = dense(6, "a")(layers.GlobalMaxPooling1D(name="max")(inputs))
    return model(inputs, layers.GRU(6, name="gru")(inputs, initial_state=state))


@case({"gru": (5, "an outer state of 'gru'")})
def initial_state_from_outside():
    inputs, state = rows(), keras.Input((5,), name="state")
    return model([inputs, state], layers.GRU(5, name="gru")(inputs, initial_state=state))


@case({"encoder + decoder": 6})
def encoder_decoder():
    inputs = rows()
    _, *states = layers.LSTM(6, return_state=True, name="encoder")(inputs)
    x = layers.LSTM(6, return_sequences=True, name="decoder")(inputs, initial_state=states)
    return model(inputs, x)


@case({"a": 7, "lstm": (6, "the activation 'softmax' of 'lstm' mixes them")})
def gates_that_mix():
    inputs = rows()
    layer = layers.LSTM(6, recurrent_activation="softmax", name="lstm")
    return model(inputs, layer(dense(7, "a")(inputs)))


@case({"lstm": (6, "'lstm' keeps its state between batches")})
def stateful():
    inputs = keras.Input(batch_shape=(4, 6, 5), name="rows")
    return model(inputs, layers.LSTM(6, stateful=True, name="lstm")(inputs))


# Normalizations and activations


@case({"a": 8, "b": 6, "c": 7})
def batch_norm():
    inputs = image()
    x = layers.BatchNormalization(name="first")(conv(8, "a", use_bias=False)(inputs))
    x = conv(6, "b")(ops.relu(x))
    x = layers.BatchNormalization(scale=False, center=False, name="plain")(x)
    x = conv(7, "c")(ops.relu(x))
    return model(inputs, layers.BatchNormalization(axis=3, scale=False, name="last")(x))


@case({"a": (8, "'norm' normalizes another axis")})
def batch_norm_of_another_axis():
    inputs = image()
    return model(inputs, layers.BatchNormalization(axis=1, name="norm")(conv(8, "a")(inputs)))


@case({"a": 8, "b": 6})
def layer_norm():
    inputs = rows()
    x = layers.LayerNormalization(name="first")(dense(8, "a")(inputs))
    x = dense(6, "b")(x)
    return model(inputs, layers.LayerNormalization(center=False, axis=2, name="second")(x))


@case({"a": (8, "'norm' normalizes over other axes too")})
def layer_norm_of_two_axes():
    inputs = rows()
    return model(inputs, layers.LayerNormalization(axis=(1, 2), name="norm")(dense(8, "a")(inputs)))


@case({"a": (8, "'norm' has no scale to mask")})
def layer_norm_without_scale():
    inputs = rows()
    return model(inputs, layers.LayerNormalization(scale=False, name="norm")(dense(8, "a")(inputs)))


@case({"a": 3, "b": 6, "c": 8})
def group_norm():
    """12 channels in 4 groups of 3; one group; one group per channel."""
    inputs = image()
    x = layers.GroupNormalization(4, name="four")(conv(12, "a")(inputs))
    x = layers.GroupNormalization(1, name="one")(conv(6, "b")(ops.relu(x)))
    x = layers.GroupNormalization(-1, name="instance")(conv(8, "c")(ops.relu(x)))
    return model(inputs, ops.relu(x))


@case({"a": 8})
def rms_norm():
    inputs = rows()
    return model(inputs, layers.RMSNormalization(name="norm")(dense(8, "a")(inputs)))


@case({"a": unknown(8, "norm", "UnitNormalization")})
def unit_norm():
    inputs = rows()
    return model(inputs, layers.UnitNormalization(name="norm")(dense(8, "a")(inputs)))


@case({"a": 8, "b": 6})
def prelu():
    inputs = image()
    x = layers.PReLU(shared_axes=(1, 2), name="shared")(conv(8, "a")(inputs))
    return model(inputs, layers.PReLU(name="own")(conv(6, "b")(x)))


@case({"a": 8})
def prelu_of_one_number():
    inputs = image()
    return model(inputs, layers.PReLU(shared_axes=(1, 2, 3), name="prelu")(conv(8, "a")(inputs)))


@case({"a": 8, "b": 6})
def functions_of_one_value():
    inputs = image()
    x = conv(8, "a")(inputs)
    x = layers.LeakyReLU(name="leaky")(ops.tanh(x) * 2.0 + 1.0)
    x = layers.Activation("softplus", name="softplus")(x)
    x = layers.GaussianNoise(0.1, name="noise")(layers.Dropout(0.3, name="dropout")(x))
    x = ops.square(ops.exp(-ops.abs(conv(6, "b")(x))))
    return model(inputs, layers.Rescaling(0.5, offset=0.1, name="rescale")(x))


@case({"a": (8, "the activation 'softmax' of 'a' mixes them")})
def softmax_activation():
    inputs = image()
    return model(inputs, conv(8, "a", activation="softmax")(inputs))


@case({"a": (8, "'softmax' (softmax) mixes them")})
def softmax_layer():
    inputs = image()
    return model(inputs, layers.Softmax(name="softmax")(conv(8, "a")(inputs)))


@case({"a": 8})
def softmax_over_rows():
    inputs = rows()
    return model(inputs, layers.Softmax(axis=1, name="softmax")(dense(8, "a")(inputs)))


def halved(x):
    return x * 0.5


@case({"a": unknown(8, "lambda", "Lambda")})
def lambda_layer():
    inputs = image()
    return model(inputs, layers.Lambda(halved, name="lambda")(conv(8, "a")(inputs)))


@case({"a": 8, "lstm": 6, "b": 7})
def masking():
    inputs = rows()
    x = layers.Masking(name="masking")(ops.relu(dense(8, "a")(inputs)))
    return model(inputs, dense(7, "b")(layers.LSTM(6, name="lstm")(x)))


@case({"a": (8, "'masking' compares them all with a value"), "lstm": 6})
def masking_of_a_value():
    inputs = rows()
    x = layers.Masking(1.0, name="masking")(dense(8, "a", activation="hard_sigmoid")(inputs))
    return model(inputs, layers.LSTM(6, name="lstm")(x))


@case({"a": unknown(8, "cumsum", "Cumsum")})
def unknown_operation():
    inputs = image()
    return model(inputs, ops.cumsum(conv(8, "a")(inputs), axis=-1))


@case({"a": unknown(8, "rsqrt", "Rsqrt")})
def infinite_at_zero():
    inputs = image()
    return model(inputs, ops.rsqrt(conv(8, "a", activation="softplus")(inputs)))


@registered
class Reversed(layers.Dense):
    """A user's subclass of a known layer that does something else."""

    def call(self, inputs):
        return ops.flip(super().call(inputs), axis=-1)


@registered
class Identity(layers.Layer):
    """A user's layer that only has the name of a known one."""

    def call(self, inputs):
        return ops.cumsum(inputs, axis=-1)


@case({"a": unknown(8, "reversed", "Reversed"), "b": 6})
def a_subclass_of_a_known_layer():
    inputs = vector()
    x = Reversed(7, name="reversed")(dense(8, "a")(inputs))
    return model(inputs, dense(6, "b")(x))


@case({"a": unknown(8, "identity", "Identity")})
def a_namesake_of_a_known_layer():
    inputs = vector()
    return model(inputs, Identity(name="identity")(dense(8, "a")(inputs)))


@case({"a": 8, "b": 6})
def powers_and_quotients():
    inputs = image()
    x = conv(8, "a", activation="relu")(inputs) / 2.0
    x = x / (1.0 + ops.mean(ops.abs(inputs), axis=-1, keepdims=True))
    return model(inputs, ops.clip(conv(6, "b")(x) ** 2, 0.0, 5.0))


@case({"a": (8, "'true_divide' divides by them")})
def division_by_channels():
    inputs = image()
    return model(inputs, 1.0 / conv(8, "a", activation="softplus")(inputs))


@case({"a": unknown(8, "power", "Power")})
def root():
    inputs = image()
    return model(inputs, conv(8, "a", activation="relu")(inputs) ** 0.5)


@case({"a": (8, "'clip' has a value for each of them")})
def clip_per_channel():
    inputs = image()
    return model(inputs, ops.clip(conv(8, "a")(inputs), np.zeros(8), np.arange(1.0, 9.0)))


# Joined tensors


@case({"a + b": 8})
def residual():
    inputs = image()
    x = conv(8, "a", activation="relu")(inputs)
    y = layers.BatchNormalization(name="norm")(conv(8, "b")(x))
    return model(inputs, ops.relu(layers.Add(name="add")([x, y])))


@case({"stem + body": 8})
def residual_of_a_shared_layer():
    inputs = image()
    body = conv(8, "body", activation="relu")
    x = conv(8, "stem")(inputs)
    for _ in range(3):
        x = x + body(x)
    return model(inputs, x)


@case({"a": (3, "'add' joins them with what keeps its size"), "b": 6})
def residual_of_the_input():
    inputs = image()
    x = layers.Add(name="add")([inputs, conv(3, "a")(inputs)])
    return model(inputs, conv(6, "b")(x))


@case({"a + b + c + d": 8})
def merges():
    inputs = image()
    a, b, c, d = (conv(8, name)(inputs) for name in "abcd")
    x = layers.Maximum(name="maximum")([layers.Average(name="average")([a, b]), c])
    x = ops.where(ops.greater(ops.mean(inputs, axis=-1, keepdims=True), 0.0), x, d)
    return model(inputs, layers.Subtract(name="subtract")([x, ops.minimum(a, 0.3)]))


@case({"a": (8, "'multiply' joins them with what keeps its size")})
def product_with_a_constant_per_channel():
    inputs = image()
    return model(inputs, conv(8, "a")(inputs) * np.arange(1.0, 9.0, dtype="float32"))


@case({"conv + expand": 8, "reduce": 4})
def squeeze_excite():
    inputs = image()
    x = conv(8, "conv", activation="swish")(inputs)
    y = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    y = conv(4, "reduce", 1, activation="relu")(y)
    y = conv(8, "expand", 1, activation="sigmoid")(y)
    return model(inputs, layers.Multiply(name="excite")([x, y]))


@case({"conv + expand": 8, "reduce": 4})
def squeeze_excite_of_other_rank():
    inputs = image()
    x = conv(8, "conv", activation="swish")(inputs)
    y = dense(4, "reduce", activation="relu")(layers.GlobalAveragePooling2D(name="squeeze")(x))
    y = dense(8, "expand", activation="sigmoid")(y)
    return model(inputs, x * layers.Reshape((1, 1, 8), name="reshape")(y))


@case({"a": 8, "gate": (1, "'multiply' repeats it")})
def spatial_gate():
    inputs = image()
    x = conv(8, "a", activation="relu")(inputs)
    return model(inputs, layers.Multiply(name="multiply")([x, conv(1, "gate")(x)]))


@case({"a": 4, "b": 6, "c": 5})
def concatenation():
    inputs = image()
    x = layers.Concatenate(name="join")([conv(4, "a")(inputs), conv(6, "b")(inputs), inputs])
    return model(inputs, conv(5, "c")(ops.relu(x)))


@case({"a + b": 6, "c": 5})
def concatenation_along_another_axis():
    inputs = image()
    x = layers.Concatenate(axis=1, name="join")([conv(6, "a")(inputs), conv(6, "b")(inputs)])
    return model(inputs, conv(5, "c")(x))


@case({"a": (3, "'join' joins them with what keeps its size"), "c": 5})
def concatenation_with_the_input_along_another_axis():
    inputs = image()
    x = layers.Concatenate(axis=1, name="join")([conv(3, "a")(inputs), inputs])
    return model(inputs, conv(5, "c")(x))


@case({"stem": 8, "c + a": 4, "d + b": 6})
def dense_blocks_in_parallel():
    """The sum of two concatenations couples their parts one by one."""
    inputs = image()
    x = conv(8, "stem", activation="relu")(inputs)
    left = ops.concatenate([conv(4, "a")(x), conv(6, "b")(x)], axis=-1)
    right = ops.concatenate([conv(4, "c")(x), conv(6, "d")(x)], axis=-1)
    return model(inputs, left + right)


@case({"c + a": 3, "b + a": 5})
def concatenations_that_overlap():
    """8 channels against 3 + 5: one layer produces two groups."""
    inputs = image()
    joined = ops.concatenate([conv(3, "c")(inputs), conv(5, "b")(inputs)], axis=-1)
    return model(inputs, ops.relu(conv(8, "a")(inputs) + joined))


# Movements


@case({"conv": 4, "hidden": 6})
def flatten():
    inputs = image()
    x = layers.Flatten(name="flatten")(conv(4, "conv", activation="relu", strides=2)(inputs))
    return model(inputs, dense(6, "hidden", activation="relu")(x))


@case({"conv": 4, "hidden": 6})
def flatten_and_normalize():
    inputs = image()
    x = layers.Flatten(name="flatten")(conv(4, "conv", strides=4)(inputs))
    x = layers.LayerNormalization(name="layer")(layers.BatchNormalization(name="batch")(x))
    return model(inputs, dense(6, "hidden")(x))


@case({"project": 8, "up": 6})
def generator():
    """128 units become 8 channels of 4 x 4 positions, which go together."""
    inputs = vector()
    x = layers.Reshape((4, 4, 8), name="reshape")(dense(128, "project")(inputs))
    x = layers.Conv2DTranspose(6, 3, strides=2, name="up")(ops.relu(x))
    return model(inputs, x)


@case({"a": 8, "b": 6})
def permute():
    inputs = image()
    x = layers.Permute((3, 1, 2), name="first")(conv(8, "a")(inputs))
    x = layers.Permute((2, 3, 1), name="last")(ops.relu(x))
    x = ops.swapaxes(ops.moveaxis(x, 3, 1), 2, 3)
    x = ops.transpose(x, (0, 3, 2, 1))
    return model(inputs, conv(6, "b")(x))


@case({"a": (8, "'b' reads another axis"), "b": 6})
def permute_before_a_convolution():
    inputs = image()
    x = layers.Permute((3, 1, 2), name="permute")(conv(8, "a")(inputs))
    return model(inputs, conv(6, "b")(x))


@case({"a": 4, "b": 6})
def channel_shuffle():
    """8 channels in 2 groups of 4: one of each goes."""
    inputs = image()
    x = ops.reshape(conv(8, "a", activation="relu")(inputs), (-1, 8, 8, 2, 4))
    x = ops.reshape(ops.transpose(x, (0, 1, 2, 4, 3)), (-1, 8, 8, 8))
    return model(inputs, conv(6, "b")(x))


@case({"a": 4, "b": 6})
def pixel_shuffle():
    """16 channels become 4 of twice the height and width."""
    inputs = image()
    x = layers.Reshape((8, 8, 2, 2, 4), name="split")(conv(16, "a")(inputs))
    x = layers.Permute((1, 3, 2, 4, 5), name="permute")(x)
    return model(inputs, conv(6, "b")(layers.Reshape((16, 16, 4), name="join")(x)))


@case({"a": 6, "b": 5})
def space_to_depth():
    inputs = image()
    x = layers.Reshape((4, 2, 4, 2, 6), name="split")(conv(6, "a")(inputs))
    x = layers.Permute((1, 3, 2, 4, 5), name="permute")(x)
    return model(inputs, conv(5, "b")(layers.Reshape((4, 4, 24), name="join")(x)))


@case({"a": 8, "left": 5, "right": 6})
def split():
    inputs = image()
    left, right = ops.split(conv(8, "a")(inputs), 2, axis=-1)
    x = ops.concatenate([conv(5, "left")(left), conv(6, "right")(right)], axis=-1)
    return model(inputs, x)


@case({"a": 10, "left": 5, "right": 6})
def split_at():
    inputs = image()
    left, middle, right = ops.split(conv(10, "a")(inputs), [3, 5], axis=-1)
    x = ops.concatenate([conv(5, "left")(left), middle, conv(6, "right")(right)], axis=-1)
    return model(inputs, x)


@case({"a": 8, "b": 5})
def split_along_another_axis():
    inputs = image()
    top, bottom = ops.split(conv(8, "a")(inputs), 2, axis=1)
    return model(inputs, conv(5, "b")(ops.concatenate([bottom, top], axis=1)))


@case({"a": 4, "b": 5})
def halves_that_are_added():
    inputs = image()
    left, right = ops.split(conv(8, "a")(inputs), 2, axis=-1)
    return model(inputs, conv(5, "b")(left + right))


@case({"a": 8, "left": 5, "right": 6})
def slices():
    inputs = image()
    x = conv(8, "a")(inputs)
    left, right = conv(5, "left")(x[..., :3]), conv(6, "right")(x[:, ::2, 1:, -5:])
    left = layers.GlobalMaxPooling2D(name="max_left")(left)
    right = layers.GlobalMaxPooling2D(name="max_right")(right)
    return model(inputs, ops.concatenate([left, right], axis=-1))


@case({"a": (8, "'get_item' takes single ones of them"), "b": 5})
def slices_with_steps():
    inputs = image()
    return model(inputs, conv(5, "b")(conv(8, "a")(inputs)[..., ::2]))


@case({"a": (8, "'get_item' takes single ones of them"), "b": 5})
def one_channel_by_its_number():
    inputs = image()
    x = conv(8, "a")(inputs)
    return model(inputs, conv(5, "b")(x * x[..., 3][..., None]))


@case({"a + b": 8, "c": 6})
def stack():
    inputs = image()
    x = ops.stack([conv(8, "a")(inputs), conv(8, "b")(inputs)], axis=3)
    return model(inputs, conv(6, "c")(ops.max(x, axis=3)))


@case({"a": 2, "c": 6})
def stack_of_many():
    """8 parts of 2 channels each, stacked: the channels go, not the parts."""
    inputs = rows()
    parts = ops.split(dense(16, "a")(inputs), 8, axis=-1)
    return model(inputs, dense(6, "c")(ops.sum(ops.stack(parts, axis=1), axis=1)))


@case({"a": 8, "b": 6})
def repetitions():
    inputs = vector()
    x = layers.RepeatVector(4, name="vectors")(dense(8, "a")(inputs))
    x = ops.tile(ops.repeat(x, 2, axis=-1), (1, 2, 2))
    x = ops.flip(ops.expand_dims(x, 1), axis=-1)
    return model(inputs, dense(6, "b")(ops.squeeze(x, 1)))


@case({"a": 4, "b": 6})
def steps_of_unknown_length():
    """8 channels become 2 steps of 4: of each pair one goes."""
    inputs = keras.Input((None, 5), name="rows")
    x = layers.Reshape((-1, 4), name="reshape")(dense(8, "a")(inputs))
    return model(inputs, dense(6, "b")(x))


# Along the other axes


@case({"a": 8, "b": 6, "c": 5})
def padding_and_pooling():
    inputs = image()
    x = layers.ZeroPadding2D(1, name="pad")(conv(8, "a")(inputs))
    x = layers.MaxPooling2D(2, name="max")(x)
    x = layers.Cropping2D(1, name="crop")(conv(6, "b")(x))
    x = layers.AveragePooling2D(2, padding="same", name="average")(x)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="enlarge")(x)
    x = layers.Resizing(5, 5, name="resize")(conv(5, "c")(x))
    return model(inputs, x)


@case({"a": 8, "b": 6})
def pooling_of_rows():
    inputs = rows()
    x = layers.ZeroPadding1D(1, name="pad")(dense(8, "a")(inputs))
    x = layers.UpSampling1D(2, name="enlarge")(layers.MaxPooling1D(2, name="max")(x))
    x = dense(6, "b")(layers.Cropping1D(1, name="crop")(x))
    return model(inputs, layers.AveragePooling1D(2, name="average")(x))


@case({"a": 8, "b": 6})
def pooling_operations():
    inputs = image()
    x = ops.pad(conv(8, "a")(inputs), [[0, 0], [1, 1], [1, 0], [0, 0]], constant_values=0.5)
    x = ops.image.resize(ops.max_pool(x, 2, 2), (6, 6))
    return model(inputs, ops.average_pool(conv(6, "b")(x), 2, 1))


@case({"a": (8, "'pad' pads along their axis"), "b": 6})
def padding_of_channels():
    inputs = image()
    x = ops.pad(conv(8, "a")(inputs), [[0, 0], [0, 0], [0, 0], [2, 2]])
    return model(inputs, conv(6, "b")(x))


@case({"a": 8, "b": 6})
def global_pooling():
    inputs = image()
    x = conv(8, "a")(inputs)
    x = layers.GlobalMaxPooling2D(keepdims=True, name="max")(x)
    x = layers.GlobalAveragePooling2D(name="average")(conv(6, "b", 1)(x))
    return model(inputs, x)


@case({"a": 8, "b": 6})
def reductions():
    inputs = image()
    x = ops.mean(conv(8, "a")(inputs), axis=(1, 2), keepdims=True)
    x = ops.sum(ops.max(conv(6, "b", 1)(x), axis=1), axis=-2)
    return model(inputs, x)


@case({"a": 6, "b": 5})
def average_over_rows():
    inputs = rows()
    return model(inputs, dense(5, "b")(ops.average(dense(6, "a")(inputs), axis=1)))


@case({"a": (6, "'average' (Average) mixes them"), "b": 5})
def average_over_channels():
    inputs = rows(length=6)
    return model(inputs, dense(5, "b")(ops.average(dense(6, "a")(inputs), axis=-1)))


@case({"a": 8, "b": 6})
def steps_taken_and_rolled():
    inputs = rows()
    x = ops.roll(dense(8, "a")(inputs), 2, axis=1)
    first, *_, last = ops.unstack(x, axis=1)
    return model(inputs, dense(6, "b")(first + last * ops.take(x, 1, axis=1)))


@case({"a": (8, "'roll' moves along their axis"), "b": 6})
def rolled_channels():
    inputs = rows()
    return model(inputs, dense(6, "b")(ops.roll(dense(8, "a")(inputs), 2, axis=-1)))


@case({"a": 4, "lstm": 6})
def columns_of_an_image():
    """Rows of 8 columns of 4 channels become 8 steps of 32."""
    inputs = image()
    x = layers.Reshape((8, 32), name="reshape")(conv(4, "a", activation="relu")(inputs))
    return model(inputs, layers.LSTM(6, name="lstm")(x))


@case({"a": (8, "'mean' (Mean) mixes them"), "b": 6})
def mean_of_channels():
    inputs = image()
    x = ops.mean(conv(8, "a")(inputs), axis=-1, keepdims=True)
    return model(inputs, conv(6, "b")(x))


# Variables, attention, gates


@registered
class Tokens(layers.Layer):
    """Embeds rows, puts a class token before them and adds embeddings of their positions."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.embed = dense(width, "embed")

    def build(self, input_shape):
        self.embed.build(input_shape)
        length, width = input_shape[1], self.width
        self.token = self.add_weight(shape=(1, 1, width), name="token")
        self.positions = self.add_weight(shape=(length + 1, width), name="positions")

    def call(self, inputs):
        token = ops.broadcast_to(self.token, (ops.shape(inputs)[0], 1, self.width))
        return ops.concatenate([token, self.embed(inputs)], axis=1) + self.positions

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[1] + 1, self.width)

    def get_config(self):
        return super().get_config() | {"width": self.width}


@registered
class OwnProduct(layers.Layer):
    """Products with a variable of its own, beside a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense(8, "dense")

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.matrix = self.add_weight(shape=(input_shape[-1], 8), name="matrix")
        self.scale = self.add_weight(shape=(8,), name="scale", initializer="ones")

    def call(self, inputs):
        return self.dense(inputs) + ops.matmul(inputs, self.matrix) * self.scale


@registered
class Scale(layers.Layer):
    """A user's layer without layers in it: it is kept whole."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), name="scale")

    def call(self, inputs):
        return inputs * self.scale


@case({"tokens-embed": 8, "b": 6})
def class_token():
    inputs = rows()
    return model(inputs, dense(6, "b")(Tokens(8, name="tokens")(inputs)))


@case({"a": (7, "'own-matmul' sums over them"), "own-dense": 8, "c": 6})
def own_product():
    """The variable follows the channels of the layer that its product is added to."""
    inputs = rows()
    x = OwnProduct(name="own")(dense(7, "a")(inputs))
    return model(inputs, dense(6, "c")(x))


@case({"a": unknown(8, "scale", "Scale")})
def a_layer_of_the_users():
    inputs = rows()
    return model(inputs, Scale(name="scale")(dense(8, "a")(inputs)))


def attended(query, value, **kwargs):
    return layers.MultiHeadAttention(4, 3, name="attention", **kwargs)(query, value)


OUTPUT = "attention-attention_output"
HEADS = "attention-query + attention-key + attention-value"


@case({HEADS: 4, OUTPUT: 6})
def self_attention():
    inputs = rows(channels=6)
    return model(inputs, attended(inputs, inputs))


@case({HEADS: 4, "a": 8, "b": 7, OUTPUT: 8})
def cross_attention():
    query, value = rows(), keras.Input((4, 5), name="others")
    x = attended(dense(8, "a")(query), dense(7, "b")(value), value_dim=5, use_bias=False)
    return model([query, value], x)


@case({HEADS: 4, "embed + attention-attention_output + down": 8, "up": 12})
def transformer_block():
    inputs = rows()
    x = dense(8, "embed")(inputs)
    y = layers.LayerNormalization(name="first")(x)
    x = x + attended(y, y)
    y = dense(12, "up", activation="gelu")(layers.LayerNormalization(name="second")(x))
    return model(inputs, layers.LayerNormalization(name="last")(x + dense(8, "down")(y)))


@case({"attention-value + attention-key + attention-query": 2, "a": 8, OUTPUT: 8})
def group_query_attention():
    """4 query heads on 2 of key and value: a pair goes together with its key and value."""
    inputs = rows()
    layer = layers.GroupQueryAttention(3, 4, 2, name="attention")
    x = dense(8, "a")(inputs)
    return model(inputs, layer(x, x))


@registered
class ByBatchSize(layers.Layer):
    """Attention whose reshapes ask for the size of the batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = dense(24, "inner")

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        batch, length = ops.shape(inputs)[0], inputs.shape[1]
        x = ops.reshape(self.inner(inputs), (batch, length, 3, 2, 4))
        q, k, v = (ops.squeeze(part, 2) for part in ops.split(x, 3, axis=2))
        scores = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k) / 2.0, axis=-1)
        return ops.reshape(ops.einsum("bhqk,bkhd->bqhd", scores, v), (batch, length, 8))


@case({"own-inner": 2, "b": 7})
def attention_by_batch_size():
    inputs = rows()
    return model(inputs, dense(7, "b")(ByBatchSize(name="own")(inputs)))


@case({"a": 2, "b": 7})
def packed_attention():
    """24 units are queries, keys and values of 2 heads of size 4: heads go."""
    inputs = rows()
    x = ops.reshape(dense(24, "a")(inputs), (-1, 6, 3, 2, 4))
    q, k, v = (ops.transpose(x[:, :, i], (0, 2, 1, 3)) for i in range(3))
    scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)) * 0.5, axis=-1)
    x = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
    return model(inputs, dense(7, "b")(ops.reshape(x, (-1, 6, 8))))


@case({"a": 2, "b": 7})
def packed_attention_with_the_batch_inside():
    """The same, as vision transformers write it: the batch becomes the second axis."""
    inputs = rows()
    x = ops.reshape(dense(24, "a")(inputs), (-1, 6, 3, 2, 4))
    x = ops.transpose(x, (2, 0, 3, 1, 4))
    q, k, v = x[0], x[1], x[2]
    scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, -1, -2)) * 0.5, axis=-1)
    x = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
    return model(inputs, dense(7, "b")(ops.reshape(x, (-1, 6, 8))))


@case({"a": 8, "b": 6})
def windows():
    """Windows of an image become samples and an image again."""
    inputs = image()
    x = ops.reshape(conv(8, "a")(inputs), (-1, 2, 4, 2, 4, 8))
    x = ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 16, 8))
    x = ops.softmax(x, axis=1)
    x = ops.transpose(ops.reshape(x, (-1, 2, 2, 4, 4, 8)), (0, 1, 3, 2, 4, 5))
    return model(inputs, conv(6, "b")(ops.reshape(x, (-1, 8, 8, 8))))


@case({"gate + up": 12, "embed + down": 8})
def gated_unit():
    inputs = rows()
    x = layers.RMSNormalization(name="norm")(dense(8, "embed")(inputs))
    y = ops.silu(dense(12, "gate", use_bias=False)(x)) * dense(12, "up", use_bias=False)(x)
    return model(inputs, x + dense(8, "down", use_bias=False)(y))


@case({"both": 6, "down": 5})
def gated_unit_in_one_layer():
    inputs = rows()
    value, gate = ops.split(dense(12, "both")(inputs), 2, axis=-1)
    return model(inputs, dense(5, "down")(value * ops.sigmoid(gate)))


# Models in models


@case({"each-conv": 6, "lstm": 5})
def time_distributed():
    inputs = keras.Input((3, 6, 6, 2), name="frames")
    x = layers.TimeDistributed(conv(6, "conv", activation="relu"), name="each")(inputs)
    x = layers.TimeDistributed(layers.GlobalAveragePooling2D(name="mean"), name="pooled")(x)
    return model(inputs, layers.LSTM(5, name="lstm")(x))


def block(channels, name, filters):
    inputs = keras.Input((None, None, channels), name=f"{name}_in")
    x = conv(filters, "conv", use_bias=False)(inputs)
    x = ops.relu(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, conv(channels, "back")(x), name=name)


@case({"stem + outer-inner-back": 8, "outer-inner-conv": 6})
def nested_models():
    inputs = image()
    x = conv(8, "stem")(inputs)
    wrapped = keras.Sequential([keras.Input((8, 8, 8)), block(8, "inner", 6)], name="outer")
    return model(inputs, x + wrapped(x))


@case({"stem + inner-back": 8, "inner-conv": 6})
def shared_submodel():
    inputs = image()
    x, inner = conv(8, "stem")(inputs), block(8, "inner", 6)
    return model(inputs, inner(x + inner(x)))


@case({"tower": 6, "b": 5})
def two_towers():
    left, right = rows(), keras.Input((4, 5), name="others")
    tower, pool = dense(6, "tower", activation="relu"), layers.GlobalMaxPooling1D(name="max")
    x = ops.concatenate([pool(tower(left)), pool(tower(right))], axis=-1)
    return model([left, right], dense(5, "b")(x))


@case({"a": (8, GIVEN_OUT), "b": (6, GIVEN_OUT), "c": 5})
def outputs_on_the_way():
    inputs = image()
    a = conv(8, "a")(inputs)
    b = conv(6, "b")(a)
    x = layers.GlobalAveragePooling2D(name="pool")(conv(5, "c")(b))
    return keras.Model(inputs, [a, dense(3, "head")(x), ops.relu(b)], name="case")


@case({"frames": unknown(4, "convlstm", "ConvLSTM2D"), "b": 6})
def unknown_layer():
    inputs = keras.Input((3, 6, 6, 2), name="inputs")
    x = layers.Conv3D(4, 1, name="frames")(inputs)
    return model(inputs, conv(6, "b")(layers.ConvLSTM2D(5, 3, name="convlstm")(x)))


def made(name):
    """Return the model of a case with random weights."""
    case = CASES[name]
    if case.skip and BACKEND == "tensorflow":
        pytest.skip(case.skip)
    return models.randomize(case.build())
