"""Cases of channels: layers with weights."""

import keras
from channel_case import case, conv, dense, ids, image, model, rows, vector
from keras import layers, ops

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
