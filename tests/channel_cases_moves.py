"""Cases of channels: they move to other axes, or values move along other axes."""

import keras
from channel_case import case, conv, dense, image, model, rows, vector
from keras import layers, ops

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


@case({"a": 4, "a (2)": 4, "left": 5, "right": 6})
def split():
    inputs = image()
    left, right = ops.split(conv(8, "a")(inputs), 2, axis=-1)
    x = ops.concatenate([conv(5, "left")(left), conv(6, "right")(right)], axis=-1)
    return model(inputs, x)


@case({"a": 3, "a (2)": 2, "a (3)": 5, "left": 5, "right": 6})
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


@case({"a": 3, "a (2)": 5, "left": 5, "right": 6})
def slices():
    inputs = image()
    x = conv(8, "a")(inputs)
    left, right = conv(5, "left")(x[..., :3]), conv(6, "right")(x[:, ::2, 1:, -5:])
    left = layers.GlobalMaxPooling2D(name="max_left")(left)
    right = layers.GlobalMaxPooling2D(name="max_right")(right)
    return model(inputs, ops.concatenate([left, right], axis=-1))


@case({"a": 3, "a (2)": 2, "a (3)": 3, "b + c": 4})
def slices_that_overlap():
    """What both slices hold is a group of its own: neither can lose all of its channels."""
    inputs = image()
    x = conv(8, "a")(inputs)
    return model(inputs, conv(4, "b")(x[..., :5]) * conv(4, "c")(x[..., 3:]))


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
