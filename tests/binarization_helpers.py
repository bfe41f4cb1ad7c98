"""A small network with every neighbour that a binarized layer may have, binarized and trained."""

import keras
import numpy as np
from keras import layers

import keras_compress as kc

BINARIZED = ["second", "third", "pointwise", "hidden"]
WITHOUT_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}


def block(x, layer):
    return layers.ReLU(name=f"{layer.name}_relu")(layers.BatchNormalization()(layer(x)))


def network():
    """Residual, depthwise, pooled and dense: every neighbour that a binarized layer may have."""
    inputs = keras.Input((16, 16, 3), name="image")
    x = shortcut = block(inputs, layers.Conv2D(16, 3, padding="same", name="first"))
    x = block(x, layers.Conv2D(16, 3, padding="same", use_bias=False, name="second"))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="third")(x)
    x = layers.Add(name="add")([shortcut, layers.BatchNormalization()(x)])
    x = layers.MaxPooling2D()(layers.ReLU(name="sum")(x))
    x = block(x, layers.DepthwiseConv2D(3, padding="same", name="depthwise"))
    x = layers.MaxPooling2D(name="pool")(x)
    x = block(x, layers.Conv2D(32, 1, name="pointwise"))
    x = layers.ReLU()(layers.Dense(64, name="hidden")(layers.Flatten(name="flat")(x)))
    return keras.Model(inputs, layers.Dense(5, name="logits")(x), name="network")


def config(*others, **keys):
    own = {"algorithm": "binarization", "initializer": WITHOUT_ADAPTATION, **keys}
    return {"target_device": "CPU", "compression": [own, *others]}


def batch(samples=64, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, samples)
    x = random.normal(size=(samples, 16, 16, 3)) + labels[:, None, None, None] / 4
    return x.astype("float32"), labels


def compress(settings=None, data=True, model=None):
    data = batch()[0] if data is True else data
    settings = config() if settings is None else settings
    return kc.compress_model(model or network(), settings, data=data, verbose=False)


def trained(settings=None, epochs=2, data=True, rate=3e-3, **fit):
    model = compress(settings, data)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    options = {"batch_size": 16, "verbose": 0, "callbacks": callbacks} | fit
    model.fit(*batch(), epochs=epochs, **options)
    return model


def kernels(model):
    """Return {layer: its effective kernel}."""
    compressed = (layer for layer in model.layers if "kernel" in getattr(layer, "weight_names", ()))
    return {layer.name: layer.effective_weight("kernel") for layer in compressed}


def quantizer_of(model, layer):
    return model.get_layer(layer).transforms_of("kernel")[-1]
