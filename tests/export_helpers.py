"""A small network with every kind of weighted layer, compressed, and data for it."""

import keras
import numpy as np
from keras import layers

import keras_compress as kc

IMAGE = "image"
CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    },
}


def block(x, layer):
    x = layers.BatchNormalization()(layer(x))
    return layers.ReLU()(x)


def network():
    """Two outputs; the second is named before the first in the alphabet."""
    inputs = keras.Input((16, 16, 3), name=IMAGE)
    x = shortcut = block(inputs, layers.Conv2D(16, 3, padding="same", name="first"))
    x = block(x, layers.Conv2D(16, 3, padding="same", use_bias=False, name="second"))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="third")(x)
    x = layers.Add()([shortcut, layers.BatchNormalization()(x)])
    x = layers.ReLU()(x)
    x = block(x, layers.DepthwiseConv2D(3, padding="same", name="depthwise"))
    x = block(x, layers.Conv2DTranspose(16, 3, strides=2, padding="same", name="transposed"))
    pooled = layers.GlobalAveragePooling2D()(x)
    rows = layers.Dense(6, name="auxiliary")(layers.Reshape((-1, 32))(layers.MaxPooling2D(2)(x)))
    logits = layers.Dense(10, name="logits")(pooled)
    return randomized(keras.Model(inputs, [logits, rows], name="network"))


def randomized(model):
    """Give biases and batch-norm statistics values that matter."""
    random = np.random.default_rng(1)
    for variable in model.weights:
        kind = variable.path.rpartition("/")[2]
        if kind in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        elif kind in ("beta", "bias", "moving_mean"):
            variable.assign(random.normal(0, 0.2, variable.shape))
    return model


def images(samples=32, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, 16, 16, 3)).astype("float32")


def compressed(model=None, config=CONFIG, data=None):
    data = images() if data is None else data
    return kc.compress_model(model or network(), config, data=data, verbose=False)


def outputs_of(model, data=None):
    data = images() if data is None else data
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(data, training=False))]
