"""More of the collection in `models`: what users' models have and older tools stumbled over."""

import keras
import numpy as np
from keras import layers, ops
from models import ConvBlock, collected, registered


@registered
class StochasticDepth(layers.Layer):
    """Drops a whole branch per sample in training; a layer with random state and no layers."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, inputs, training=False):
        if not training:
            return inputs
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        kept = keras.random.uniform(shape, seed=self.seed_generator) >= self.rate
        return inputs * ops.cast(kept, inputs.dtype) / (1 - self.rate)

    def get_config(self):
        return super().get_config() | {"rate": self.rate}


@registered
class Scaled(layers.Layer):
    """A layer whose `call` takes settings beside the tensor."""

    def call(self, inputs, factor=1.0, *, shift=0.0):
        return inputs * factor + shift

    def compute_output_shape(self, inputs_shape):
        return inputs_shape


@registered
class Stack(layers.Layer):
    """A loop over a list of layers, with a layer inside a layer inside a layer."""

    def __init__(self, depth, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = [ConvBlock(4, name=f"block_{i}") for i in range(depth)]

    def build(self, input_shape):
        for block in self.blocks:
            block.build(input_shape)

    def call(self, inputs, training=False):
        x = inputs
        for index, block in enumerate(self.blocks):
            x = block(x, training=training) if index % 2 == 0 else block(x, training=training) + x
        return x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"depth": self.depth}


@registered
class DeepModel(keras.Model):
    """Functional inside Sequential inside a layer inside a subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inputs = keras.Input((8, 8, 4), name="inner")
        inner = keras.Model(inputs, ConvBlock(4, name="deep")(inputs), name="functional")
        self.body = keras.Sequential([inner, Stack(2, name="stack")], name="body")
        self.pool = layers.GlobalMaxPooling2D(name="pool")
        self.heads = [layers.Dense(2, name="first"), layers.Dense(3, name="second")]

    def call(self, inputs, training=None):
        x = self.pool(self.body(inputs, training=training))
        return {"heads": [head(x) for head in self.heads], "features": x}


@collected
def preprocessing():
    inputs = keras.Input((10, 10, 3), name="image")
    x = layers.RandomFlip("horizontal", seed=0, name="flip")(inputs)
    x = layers.RandomTranslation(0.1, 0.1, seed=0, name="translate")(x)
    x = layers.GaussianNoise(0.1, seed=0, name="noise")(x)
    x = layers.Resizing(9, 9, name="resize")(x)
    x = layers.CenterCrop(8, 8, name="crop")(x)
    x = layers.Rescaling(0.5, offset=0.1, name="rescale")(x)
    x = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0], name="normalize")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x), name="prepared")


@collected
def stochastic_depth():
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = layers.Add(name="add")([inputs, StochasticDepth(0.3, name="drop_path")(x)])
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x), name="stochastic")


@collected
def keyword_arguments():
    a, b = keras.Input((5, 6), name="a"), keras.Input((3, 6), name="b")
    x = layers.MultiHeadAttention(2, 3, name="cross")(query=a, value=b, key=b)
    x = Scaled(name="scaled")(x, factor=0.5, shift=0.1)
    x = layers.Dense(4, name="dense")(x)
    return keras.Model({"a": a, "b": b}, ops.sum(x, axis=1, keepdims=False), name="keywords")


@collected
def attention_mask():
    x, mask = keras.Input((5, 8), name="x"), keras.Input((5, 5), dtype="bool", name="mask")
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x, attention_mask=mask)
    y = layers.LayerNormalization(name="norm")(layers.Add(name="add")([x, y]))
    return keras.Model([x, mask], layers.Dense(2, name="head")(y), name="masked_attention")


@collected
def group_query_attention():
    x = keras.Input((5, 8), name="x")
    y = layers.GroupQueryAttention(4, 4, 2, name="attention")(x, x)
    y = layers.RMSNormalization(name="norm")(y)
    return keras.Model(x, layers.Dense(2, name="head")(y), name="grouped_attention")


@collected
def masked_sequence():
    inputs = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 8, mask_zero=True, name="embedding")(inputs)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="masked")


def _language_model(tied, name):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    embedding = layers.ReversibleEmbedding(9, 8, tie_weights=tied, name="embedding")
    x = layers.Dense(8, activation="gelu", name="mlp")(embedding(tokens))
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(tokens, embedding(x, reverse=True), name=name)


def looked_up_numbers():
    numbers = keras.Input((3,), dtype="int64", name="numbers")
    lookup = layers.IntegerLookup(vocabulary=[3, 1, 4], output_mode="one_hot", name="lookup")
    x = layers.Dense(4, activation="relu", name="dense")(lookup(numbers))
    return keras.Model(numbers, layers.Dense(2, name="head")(x), name="numbers")


if keras.backend.backend() != "jax":  # `IntegerLookup` takes int64, which JAX has not
    collected(looked_up_numbers)


@collected
def tied_embedding():
    return _language_model(True, "tied")


@collected
def untied_embedding():
    return _language_model(False, "untied")


def channels_first():
    """Not collected: TensorFlow has no such convolutions on the CPU."""
    inputs = keras.Input((3, 8, 8), name="image")
    first = {"data_format": "channels_first"}
    x = layers.Conv2D(4, 3, padding="same", name="conv", **first)(inputs)
    x = layers.BatchNormalization(axis=1, name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise", **first)(x)
    x = layers.GlobalAveragePooling2D(name="pool", **first)(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="first")


@collected
def unknown_sizes():
    inputs = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv", activation="relu")(inputs)
    y = layers.Conv2D(4, 3, padding="same", name="body")(x)
    x = layers.Add(name="add")([x, y])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="any_size")


@collected
def mixed_policy():
    policy = {"dtype": "mixed_bfloat16"}
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv", **policy)(inputs)
    x = layers.BatchNormalization(name="norm", **policy)(x)
    x = layers.Activation("relu", name="relu", **policy)(x)
    x = layers.GlobalAveragePooling2D(name="pool", **policy)(x)
    return keras.Model(inputs, layers.Dense(2, dtype="float32", name="head")(x), name="mixed")


@collected
def u_net():
    inputs = keras.Input((8, 8, 3), name="image")
    a = layers.Conv2D(4, 3, padding="same", activation="relu", name="down")(inputs)
    x = layers.MaxPooling2D(name="pool")(a)
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="bottom")(x)
    x = layers.Conv2DTranspose(4, 2, strides=2, name="up")(x)
    x = layers.Concatenate(name="skip")([a, x])
    x = layers.UpSampling2D(2, name="enlarge")(x)
    x = layers.Cropping2D(1, name="crop")(layers.ZeroPadding2D(1, name="pad")(x))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="mask")(x), name="u_net")


@collected
def activations():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 1, name="conv", activation="hard_swish")(inputs)
    x = layers.PReLU(shared_axes=(1, 2), name="prelu")(layers.Conv2D(4, 1, name="one")(x))
    y = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    y = layers.Conv2D(4, 1, name="gate", activation="hard_sigmoid")(y)
    x = layers.Multiply(name="excite")([x, y])
    x = layers.Activation("gelu", name="gelu")(layers.Conv2D(4, 1, name="two")(x))
    x = layers.ELU(name="elu")(layers.Conv2D(4, 1, name="three")(x))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="last")(x), name="activations")


@collected
def normalizations():
    inputs = keras.Input((6, 8), name="rows")
    x = layers.Dense(8, name="a")(layers.LayerNormalization(name="layer")(inputs))
    x = layers.Dense(8, name="b")(layers.GroupNormalization(4, name="group")(x))
    x = layers.Dense(8, name="c")(layers.RMSNormalization(name="rms")(x))
    x = layers.Dense(8, name="d")(layers.UnitNormalization(name="unit")(x))
    return keras.Model(inputs, layers.Dense(2, name="e")(x), name="normalized")


@collected
def deep():
    model = DeepModel(name="deep")
    model(np.zeros((1, 8, 8, 4), "float32"))
    model.example = keras.KerasTensor((None, 8, 8, 4))
    return model


@collected
def shared_many_times():
    conv = layers.Conv2D(4, 3, padding="same", name="conv")
    inner = layers.Conv2D(4, 3, padding="same", name="inner")
    block = keras.Sequential(
        [keras.Input((8, 8, 4)), inner, layers.ReLU(name="relu")], name="block"
    )
    inputs = keras.Input((8, 8, 4), name="image")
    x = block(conv(conv(inputs)))
    return keras.Model(inputs, block(x) + x, name="again_and_again")


@collected
def einsum_products():
    a, b = keras.Input((5, 8), name="a"), keras.Input((5, 8), name="b")
    scores = ops.einsum("bik,bjk->bij", layers.Dense(4, name="q")(a), layers.Dense(4, name="k")(b))
    weights = ops.softmax(scores * 0.5, axis=-1)
    x = ops.matmul(weights, layers.Dense(4, name="v")(b))
    return keras.Model([a, b], layers.Dense(2, name="head")(x), name="products")


@collected
def over_time():
    frames = keras.Input((4, 8, 8, 3), name="frames")
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(name="pool"),
        ],
        name="encoder",
    )
    x = layers.TimeDistributed(encoder, name="per_frame")(frames)
    x = layers.TimeDistributed(layers.Dense(5, activation="relu", name="dense"), name="wide")(x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both")(x)
    x = layers.GRU(4, return_sequences=True, go_backwards=True, name="gru")(x)
    x = layers.SimpleRNN(4, name="simple")(x)
    return keras.Model(frames, layers.Dense(2, name="head")(x), name="video")


@collected
def both_directions():
    inputs = keras.Input((5, 6), name="rows")
    outputs = []
    for mode in ("concat", "sum", "ave", "mul", None):
        name = str(mode)
        gru = layers.GRU(3, return_sequences=mode in ("sum", None), name=f"{name}_gru")
        outputs += keras.tree.flatten(layers.Bidirectional(gru, merge_mode=mode, name=name)(inputs))
    return keras.Model(inputs, outputs, name="both_directions")


@collected
def bidirectional_states():
    inputs = keras.Input((5, 6), name="rows")
    x = layers.Dense(4, name="before")(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_state=True), name="stateful")(x)
    x = layers.Concatenate(name="states")(x)
    return keras.Model(inputs, layers.Dense(2, name="after")(x), name="bidirectional_states")


@collected
def time_distributed_of_unknown_length():
    frames = keras.Input((None, 5, 8), name="frames")
    x = layers.Dense(6, name="before")(frames)
    x = layers.TimeDistributed(layers.Dense(5, name="dense"), name="dense_steps")(x)
    x = layers.TimeDistributed(layers.GlobalMaxPooling1D(), name="wide")(x)
    return keras.Model(frames, layers.LSTM(3, name="after")(x), name="unknown_length")


@collected
def other_ranks():
    inputs = keras.Input((12, 2), name="signal")
    x = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, name="conv1d")(inputs)
    x = layers.DepthwiseConv1D(3, padding="same", name="depthwise1d")(x)
    x = layers.Conv1DTranspose(4, 3, strides=2, padding="same", name="up1d")(x)
    x = layers.Reshape((4, 3, 2, 4), name="cube")(x)
    x = layers.Conv3D(3, 2, name="conv3d")(x)
    x = layers.Conv3DTranspose(2, 2, name="up3d")(x)
    return keras.Model(inputs, x, name="ranks")


@collected
def transposed_and_grouped():
    inputs = keras.Input((6, 6, 4), name="image")
    x = layers.Conv2D(4, 3, groups=2, name="grouped")(inputs)
    x = layers.Conv2DTranspose(3, 3, strides=2, padding="same", name="up")(x)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="resize")(x)
    return keras.Model(inputs, layers.LeakyReLU(name="leaky")(x), name="up_and_groups")


@collected
def convolutional_recurrent():
    inputs = keras.Input((3, 6, 6, 2), name="frames")
    x = layers.ConvLSTM2D(3, 3, name="convlstm")(inputs)
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x), name="frames")
