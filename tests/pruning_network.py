"""A small residual network, pruned and trained, and a look at its masks."""

import keras
import numpy as np
from backend_helpers import numpy
from export_helpers import randomized
from keras import layers

import keras_compress as kc
from keras_compress.masks import ChannelMask

SMALL = {"round_to": 1, "prune_first_conv": True, "prune_downsample_convs": True}


def network(width=16):
    """A residual block between two convolutions, and a head: groups `first`, `inner`, `last`."""
    inputs = keras.Input((8, 8, 3))
    x = shortcut = layers.Conv2D(width, 3, padding="same", name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="inner_norm")(x))
    x = layers.Conv2D(2 * width, 3, padding="same", name="inner")(x)
    x = layers.Activation("sigmoid")(x)
    x = layers.Add()([shortcut, layers.Conv2D(width, 1, name="back")(x)])
    x = layers.Conv2D(width, 3, strides=2, activation="relu", name="last")(x)
    outputs = layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))
    return randomized(keras.Model(inputs, outputs, name="network"))


def data(samples=32, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 8, 8, 3)).astype("float32")
    return x, (np.arange(samples) % 4).astype("int32")


def pruning(**params):
    return {"algorithm": "filter_pruning", "params": SMALL | params}


def compressed(*algorithms, model=None, **arguments):
    algorithms = algorithms or (pruning(schedule="baseline", pruning_target=0.5),)
    model = network() if model is None else model
    return kc.compress_model(model, {"compression": list(algorithms)}, verbose=False, **arguments)


def fitted(model, epochs, optimizer=None, **arguments):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9) if optimizer is None else optimizer
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
    x, y = data()
    callbacks = [kc.callbacks.Compress(), *arguments.pop("callbacks", ())]
    return model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **arguments,
    )


def outputs(model):
    return numpy(model(data()[0], training=False))


def relative(a, b):
    return np.abs(a - b).max() / np.ptp(b)


def masks(model):
    """Return {(layer, weight, axis): mask} of a compressed model."""
    return {
        (layer.name, weight, axis): transform.mask(axis)
        for layer in model.layers
        for weight in getattr(layer, "weight_names", ())
        for transform in layer.transforms_of(weight)
        if isinstance(transform, ChannelMask)
        for axis in transform.axes
    }
