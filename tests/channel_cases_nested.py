"""Cases of channels: variables, attention, gates, models in models."""

import keras
from channel_case import GIVEN_OUT, case, conv, dense, image, model, rows, unknown
from keras import layers, ops
from models import registered

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
    x = attended(dense(8, "a")(query), dense(7, "b")(value), use_bias=False)
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
