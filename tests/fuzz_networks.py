"""Random networks of many kinds of layers, as they are, nested or inside a class."""

import keras
import models
import numpy as np
from keras import layers, ops
from random_graphs import MOVES, Pool, random_model

SIZES = (4, 6, 8)
SEQUENCE_MOVES = []


def sequence_move(function):
    SEQUENCE_MOVES.append(function)
    return function


def named(pool, cls, *arguments, **keys):
    return cls(*arguments, name=pool.name(cls.__name__.lower()), **keys)


def grow(pool, cls, *arguments, **keys):
    """Put a layer behind a tensor of (steps, features)."""
    x = pool.take()
    pool.put(named(pool, cls, *arguments, **keys)(x), x)


@sequence_move
def dense(pool):
    activation = pool.choose(None, "relu", "gelu", "tanh")
    grow(pool, layers.Dense, pool.choose(*SIZES), activation=activation)


@sequence_move
def convolution(pool):
    padding = pool.choose("same", "causal")
    grow(pool, layers.Conv1D, pool.choose(*SIZES), 3, padding=padding)


@sequence_move
def depthwise(pool):
    grow(pool, layers.DepthwiseConv1D, 3, padding="same", depth_multiplier=pool.choose(1, 2))


@sequence_move
def separable(pool):
    grow(pool, layers.SeparableConv1D, pool.choose(*SIZES), 3, padding="same")


@sequence_move
def recurrent(pool):
    cls = pool.choose(layers.LSTM, layers.GRU, layers.SimpleRNN)
    grow(pool, cls, pool.choose(*SIZES), return_sequences=True, go_backwards=pool.choose(0, 1))


@sequence_move
def both_directions(pool):
    inner = layers.GRU(3, return_sequences=True, name=pool.name("inner"))
    grow(pool, layers.Bidirectional, inner)


@sequence_move
def over_time(pool):
    grow(pool, layers.TimeDistributed, layers.Dense(pool.choose(*SIZES), name=pool.name("inner")))


@sequence_move
def attention(pool):
    x, y = pool.take(), pool.take()
    layer = named(pool, layers.MultiHeadAttention, pool.choose(1, 2), pool.choose(2, 3))
    pool.put(layer(x, y), x, y)


@sequence_move
def grouped_attention(pool):
    x = pool.take()
    pool.put(named(pool, layers.GroupQueryAttention, 3, 4, 2)(x, x), x)


@sequence_move
def normalization(pool):
    kinds = (layers.LayerNormalization, layers.BatchNormalization, layers.RMSNormalization)
    grow(pool, pool.choose(*kinds))


@sequence_move
def einsum(pool):
    x = pool.take()
    size = x.shape[-1]
    layer = named(pool, layers.EinsumDense, "abc,cde->abde", output_shape=(None, 2, size))
    y = layer(x)
    pool.put(ops.reshape(y, (-1, x.shape[1], 2 * size)) if size < 9 else ops.mean(y, axis=2), x)


@sequence_move
def addition(pool):
    x = pool.take()
    y = pool.take(lambda t: t is not x and t.shape == x.shape)
    y = named(pool, layers.Dense, x.shape[-1])(x) if y is None else y
    join = pool.choose(layers.Add, layers.Multiply, layers.Subtract, layers.Average)
    pool.put(named(pool, join)([x, y]), x, y)


@sequence_move
def concatenation(pool):
    x, y = pool.take(), pool.take(lambda t: t.shape[-1] <= 8)
    if y is not None and x.shape[-1] <= 16:
        pool.put(named(pool, layers.Concatenate)([x, y]), x, y)


@sequence_move
def permutation(pool):
    x = pool.take()
    y = named(pool, layers.Permute, (2, 1))(x)
    y = named(pool, layers.Dense, x.shape[1])(y)
    pool.put(named(pool, layers.Permute, (2, 1))(y), x)


@sequence_move
def shared(pool):
    x = pool.take()
    layer = named(pool, layers.Dense, x.shape[-1], activation="relu")
    pool.put(layer(layer(x)), x)


@sequence_move
def nested(pool):
    x = pool.take()
    inputs = keras.Input(x.shape[1:], name=pool.name("input"))
    y = named(pool, layers.Dense, 6, activation="relu")(inputs)
    y = named(pool, layers.Dense, x.shape[-1])(y)
    inner = keras.Model(inputs, y, name=pool.name("block"))
    y = inner(x)
    pool.put(inner(y) if pool.choose(0, 1) else y, x)


@sequence_move
def custom(pool):
    x = pool.take()
    pool.put(named(pool, models.ScaledDense, pool.choose(*SIZES))(x), x)


@sequence_move
def operations(pool):
    x = pool.take()
    pool.put(pool.choose(ops.relu, ops.tanh, ops.abs, ops.silu)(x) * 0.5 + x, x)


@sequence_move
def regularization(pool):
    cls = pool.choose(layers.Dropout, layers.GaussianNoise, layers.SpatialDropout1D)
    grow(pool, cls, 0.2)


@sequence_move
def embedding(pool):
    x = pool.take()
    index = ops.cast(ops.argmax(x, axis=-1), "int32")
    y = named(pool, layers.Embedding, x.shape[-1], pool.choose(*SIZES))(index)
    pool.put(named(pool, layers.Dense, x.shape[-1])(y) + x, x)


def sequence_model(draw):
    """Return a model of sequences: one or two inputs, one or two outputs."""
    numbers = keras.Input((6, 5), name="numbers")
    pool = Pool(numbers)
    pool.random = draw
    pool.put(named(pool, layers.Dense, 6)(numbers), numbers)
    inputs = [numbers]
    if draw.random() < 0.5:
        inputs.append(keras.Input((6,), dtype="int32", name="tokens"))
        masked = draw.random() < 0.3
        pool.put(named(pool, layers.Embedding, 9, 6, mask_zero=masked)(inputs[1]))
    for _ in range(draw.randrange(2, 8)):
        draw.choice(SEQUENCE_MOVES)(pool)
    ends = []
    for x in pool.unread:
        pooling = pool.choose(layers.GlobalAveragePooling1D, layers.GlobalMaxPooling1D)
        last = layers.LSTM if draw.random() < 0.3 else pooling
        ends.append(named(pool, last, *((4,) if last is layers.LSTM else ()))(x))
    x = layers.Concatenate(name="ends")(ends) if len(ends) > 1 else ends[0]
    x = layers.Dense(5, activation="relu", name="hidden")(x)
    outputs = [layers.Dense(3, activation=draw.choice([None, "softmax"]), name="head")(x)]
    if draw.random() < 0.3:
        outputs.append(layers.Dense(2, name="second")(x))
    model = keras.Model(
        inputs if len(inputs) > 1 else inputs[0], outputs if len(outputs) > 1 else outputs[0]
    )
    return gentle(model)


def gentle(model, seed=1):
    """Give weights random values of a size that keeps signals in range, whatever the depth."""
    values = np.random.default_rng(seed)
    for variable in model.weights:
        if keras.backend.standardize_dtype(variable.dtype).startswith("float"):
            kind = variable.path.rpartition("/")[2]
            shape = tuple(variable.shape)
            if kind in ("gamma", "scale", "moving_variance", "variance"):
                variable.assign(values.uniform(0.5, 1.5, shape))
            elif len(shape) > 1:
                fan = max(np.prod(shape[:-1]), 1)
                variable.assign(values.normal(0, 1.2 / np.sqrt(fan), shape))
            else:
                variable.assign(values.normal(0, 0.2, shape))
    return model


def image_model(draw):
    names = sorted(MOVES)
    moves = [(draw.choice(names), draw.randrange(1000)) for _ in range(draw.randrange(2, 9))]
    return gentle(random_model(moves))


@models.registered
class Wrapped(keras.Model):
    """A subclassed model around another."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs, training=None):
        return self.inner(inputs, training=training)

    def get_config(self):
        return super().get_config() | {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)


def wrapped(model, draw):
    """Return the model as it is, inside another Functional model, or inside a class."""
    kind = draw.choice(["plain", "plain", "functional", "subclass"])
    if kind == "plain" or isinstance(model.input, dict):
        return model
    copies = [
        keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=f"outer_{index}")
        for index, tensor in enumerate(model.inputs)
    ]
    inputs = copies if isinstance(model.input, list) else copies[0]
    if kind == "functional":
        return keras.Model(inputs, model(inputs), name="outer")
    outer = Wrapped(model, name="wrapped")
    outer(keras.tree.map_structure(lambda t: np.zeros((1, *t.shape[1:]), t.dtype), inputs))
    outer.example = keras.tree.map_structure(
        lambda t: keras.KerasTensor((None, *t.shape[1:]), t.dtype), inputs
    )
    return outer
