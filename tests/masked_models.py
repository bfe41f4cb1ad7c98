"""More of the collection in `models`: masks that Keras carries beside the tensors."""

import keras
from keras import layers, ops
from models import collected, registered

TOKENS = 9


@registered
class EncoderBlock(layers.Layer):
    """A transformer's layer; its attention reads the mask of whatever it is called on."""

    def __init__(self, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.causal = causal
        self.attention = layers.MultiHeadAttention(2, 3, name="attention")
        self.add = layers.Add(name="add")
        self.norm = layers.LayerNormalization(name="norm")
        self.mlp = layers.Dense(6, activation="gelu", name="mlp")

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.norm.build(input_shape)
        self.mlp.build(input_shape)

    def call(self, inputs):
        x = self.attention(inputs, inputs, use_causal_mask=self.causal)
        x = self.norm(self.add([inputs, x]))
        return x + self.mlp(x)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"causal": self.causal}


@registered
class ZeroWhereMasked(layers.Layer):
    """A composite layer that is given the mask as an argument."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = units
        self.dense = layers.Dense(units, name="dense")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, mask=None):
        x = self.dense(inputs)
        return x if mask is None else ops.where(ops.expand_dims(mask, -1), x, 0.0)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return super().get_config() | {"units": self.units}


@registered
class Encoder(keras.Model):
    """A subclassed model in which a mask is made, read, lost and set anew."""

    example = keras.KerasTensor((None, 5), dtype="int32")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(TOKENS, 6, mask_zero=True, name="embedding")
        self.blocks = [EncoderBlock(name="first"), EncoderBlock(causal=True, name="second")]
        self.pool = layers.GlobalAveragePooling1D(name="pool")
        self.head = layers.Dense(2, name="head")

    def build(self, input_shape):
        self.embedding.build(input_shape)
        for block in self.blocks:
            block.build((*input_shape, 6))
        self.head.build((None, 6))

    def call(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x))


def _embedded(length=5, name="tokens", mask=True):
    tokens = keras.Input((length,), dtype="int32", name=name)
    return tokens, layers.Embedding(TOKENS, 6, mask_zero=mask, name=f"{name}_embedding")(tokens)


def _pooled(tokens, x, name):
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(tokens, layers.Dense(2, name="head")(x), name=name)


@collected
def masked_subclassed_model():
    model = Encoder(name="encoder")
    model.build((None, 5))
    return model


@collected
def masked_block():
    tokens, x = _embedded()
    return _pooled(tokens, EncoderBlock(name="block")(x), "masked_block")


@collected
def masked_block_of_unknown_length():
    tokens, x = _embedded(length=None)
    return _pooled(tokens, EncoderBlock(causal=True, name="block")(x), "masked_unknown")


@collected
def causal_attention():
    tokens, x = _embedded(length=None, mask=False)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x, use_causal_mask=True)
    return keras.Model(tokens, layers.Dense(2, name="head")(x), name="causal")


@collected
def causal_attention_with_dropout():
    values = keras.Input((5, 6), name="values")
    x = layers.Masking(name="masking")(values)
    attention = layers.MultiHeadAttention(2, 3, dropout=0.1, name="attention")
    return _pooled(values, attention(x, x, use_causal_mask=True), "causal_dropout")


@collected
def mask_argument():
    tokens, x = _embedded()
    x = ZeroWhereMasked(4, name="zeros")(x)
    return keras.Model(tokens, layers.LSTM(3, name="lstm")(x), name="mask_argument")


@collected
def masked_wrappers():
    tokens, x = _embedded()
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both")(x)
    both = layers.Bidirectional(layers.GRU(3, return_sequences=True), "sum", name="sum")
    x = layers.TimeDistributed(layers.Dense(4), name="steps")(both(x))
    return keras.Model(tokens, x, name="masked_wrappers")


@collected
def masked_group_attention():
    tokens, x = _embedded()
    y = layers.GroupQueryAttention(3, 4, 2, name="attention")(x, x)
    x = layers.Add(name="add")([x, y])
    return keras.Model(tokens, layers.LSTM(3, name="lstm")(x), name="masked_group_attention")


@collected
def masked_submodel():
    inner = keras.Input((5, 6), name="inner")
    x = layers.MultiHeadAttention(2, 3, name="attention")(inner, inner)
    submodel = keras.Model(inner, layers.Dense(3, name="dense")(x), name="submodel")
    tokens, x = _embedded()
    return keras.Model(tokens, layers.LSTM(3, name="lstm")(submodel(x)), name="masked_submodel")


@collected
def two_masks():
    tokens, x = _embedded()
    others, y = _embedded(4, name="others")
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, y)
    return keras.Model([tokens, others], layers.GRU(3, name="gru")(x), name="two_masks")


@collected
def lost_mask():
    tokens, x = _embedded()
    y = layers.MultiHeadAttention(2, 3, name="attention")(x, x)  # takes the mask away from x
    x = layers.Concatenate(name="both")([layers.LSTM(3, name="lstm")(x), y[:, 0]])
    return keras.Model(tokens, layers.Dense(2, name="head")(x), name="lost_mask")
