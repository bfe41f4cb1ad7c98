"""Cases of channels: normalizations, functions of values, tensors that are joined."""

import numpy as np
from channel_case import case, conv, dense, image, model, rows, unknown, vector
from keras import layers, ops
from models import registered

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
