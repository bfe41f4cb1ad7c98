"""Random models: a list of moves, each of which grows a pool of image tensors."""

import random

import keras
import models
from keras import layers, ops

MOVES = {}
SIZES = (4, 6, 8)  # of channels
ACTIVATIONS = (None, "relu", "sigmoid", "swish")


def move(function):
    MOVES[function.__name__] = function
    return function


class Pool:
    """Tensors to choose from, and random choices; layers get names in order."""

    def __init__(self, tensor):
        self.tensors = [tensor]
        self.unread = []
        self.random = random.Random(0)
        self.layers = 0

    def name(self, kind):
        self.layers += 1
        return f"{kind}_{self.layers}"

    def choose(self, *options):
        return self.random.choice(options)

    def take(self, fits=lambda tensor: True):
        """Return a tensor that fits, a late one sooner than an early one, or None."""
        fitting = [tensor for tensor in self.tensors[-6:] if fits(tensor)]
        return self.random.choice(fitting) if fitting else None

    def put(self, tensor, *sources):
        self.unread = [each for each in self.unread if all(each is not s for s in sources)]
        self.tensors.append(tensor)
        self.unread.append(tensor)

    def conv(self, tensor, filters, kernel=1, **kwargs):
        name = self.name("conv")
        return layers.Conv2D(filters, kernel, padding="same", name=name, **kwargs)(tensor)


def shape(tensor):
    return tuple(tensor.shape[1:])


def has_even_channels(tensor):
    return tensor.shape[-1] % 2 == 0 and tensor.shape[-1] > 2


@move
def convolution(pool):
    x, kernel = pool.take(), pool.choose(1, 3)
    activation = pool.choose(*ACTIVATIONS)
    pool.put(pool.conv(x, pool.choose(*SIZES), kernel, activation=activation), x)


@move
def strided_convolution(pool):
    x = pool.take()
    pool.put(pool.conv(x, pool.choose(*SIZES), 3, strides=2, use_bias=False), x)


@move
def transposed_convolution(pool):
    if (x := pool.take(lambda t: t.shape[1] <= 4)) is not None:
        layer = layers.Conv2DTranspose(pool.choose(*SIZES), 2, strides=2, name=pool.name("up"))
        pool.put(layer(x), x)


@move
def grouped_convolution(pool):
    if (x := pool.take(has_even_channels)) is not None:
        groups = pool.choose(2, x.shape[-1])
        pool.put(pool.conv(x, groups * pool.choose(1, 2, 3), 3, groups=groups), x)


@move
def depthwise(pool):
    x, name = pool.take(), pool.name("depthwise")
    multiplier = pool.choose(1, 2)
    layer = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=multiplier, name=name)
    pool.put(layer(x), x)


@move
def separable(pool):
    x, name = pool.take(), pool.name("separable")
    pool.put(layers.SeparableConv2D(pool.choose(*SIZES), 3, padding="same", name=name)(x), x)


@move
def batch_norm(pool):
    x, name = pool.take(), pool.name("norm")
    pool.put(layers.BatchNormalization(scale=pool.choose(True, False), name=name)(x), x)


@move
def activation(pool):
    x, name = pool.take(), pool.name("activation")
    pool.put(layers.Activation(pool.choose("relu", "sigmoid", "swish", "gelu"), name=name)(x), x)


@move
def addition(pool):
    x = pool.take()
    y = pool.take(lambda t: t is not x and shape(t) == shape(x))
    y = pool.conv(x, x.shape[-1], 3) if y is None else y
    join = pool.choose(layers.Add, layers.Multiply, layers.Maximum)
    pool.put(join(name=pool.name("join"))([x, y]), x, y)


@move
def concatenation(pool):
    x = pool.take()
    y = pool.take(lambda t: t is not x and shape(t)[:2] == shape(x)[:2])
    y = pool.conv(x, pool.choose(*SIZES)) if y is None else y
    if x.shape[-1] + y.shape[-1] <= 24:
        pool.put(layers.Concatenate(name=pool.name("concat"))([x, y]), x, y)


@move
def squeeze_excite(pool):
    x = pool.take()
    y = layers.GlobalAveragePooling2D(keepdims=True, name=pool.name("squeeze"))(x)
    y = pool.conv(pool.conv(y, 4, activation="relu"), x.shape[-1], activation="sigmoid")
    pool.put(layers.Multiply(name=pool.name("excite"))([x, y]), x)


@move
def pooling(pool):
    if (x := pool.take(lambda t: t.shape[1] >= 4)) is not None:
        cls = pool.choose(layers.MaxPooling2D, layers.AveragePooling2D)
        pool.put(cls(2, name=pool.name("pool"))(x), x)


@move
def up_sampling(pool):
    if (x := pool.take(lambda t: t.shape[1] <= 4)) is not None:
        pool.put(layers.UpSampling2D(2, name=pool.name("enlarge"))(x), x)


@move
def split(pool):
    if (x := pool.take(lambda t: t.shape[-1] >= 4)) is not None:
        left, right = ops.split(x, [pool.choose(1, 2, x.shape[-1] // 2)], axis=-1)
        pool.put(left, x)
        pool.put(right, x)


@move
def slices(pool):
    if (x := pool.take(lambda t: t.shape[-1] >= 4)) is not None:
        pool.put(x[..., : x.shape[-1] // 2] * x[..., -(x.shape[-1] // 2) :], x)


@move
def channel_shuffle(pool):
    if (x := pool.take(has_even_channels)) is not None:
        height, width, channels = shape(x)
        y = ops.reshape(x, (-1, height, width, 2, channels // 2))
        y = ops.transpose(y, (0, 1, 2, 4, 3))
        pool.put(ops.reshape(y, (-1, height, width, channels)), x)


@move
def layer_norm(pool):
    x = pool.take()
    pool.put(layers.LayerNormalization(name=pool.name("layer_norm"))(x), x)


@move
def group_norm(pool):
    if (x := pool.take(has_even_channels)) is not None:
        groups = pool.choose(1, 2, x.shape[-1])
        pool.put(layers.GroupNormalization(groups, name=pool.name("group_norm"))(x), x)


@move
def dense(pool):
    x, name = pool.take(), pool.name("dense")
    pool.put(layers.Dense(pool.choose(*SIZES), activation="relu", name=name)(x), x)


def random_model(moves):
    """Build a model of moves [(name, seed of its choices)]; every tensor leads to its output."""
    inputs = keras.Input((8, 8, 3), name="image")
    pool = Pool(inputs)
    pool.put(pool.conv(inputs, 6, 3, activation="relu"), inputs)
    for name, seed in moves:
        pool.random.seed(seed)
        MOVES[name](pool)
    ends = []
    for x in pool.unread:
        flat = pool.choose(layers.Flatten, layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
        ends.append(flat(name=pool.name("flat"))(x))
    x = layers.Concatenate(name="ends")(ends) if len(ends) > 1 else ends[0]
    x = layers.Dense(5, activation="relu", name="hidden")(x)
    return models.randomize(keras.Model(inputs, layers.Dense(3, name="head")(x), name="random"))
