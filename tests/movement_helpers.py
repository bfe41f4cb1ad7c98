"""Small models for movement sparsity, and a look at their masks."""

import keras
import numpy as np
from backend_helpers import numpy
from export_helpers import randomized
from keras import layers

import keras_compress as kc

WARMUP = {
    "warmup_start_epoch": 1,
    "warmup_end_epoch": 3,
    "importance_regularization_factor": 0.1,
}


def network():
    inputs = keras.Input((8,))
    x = layers.Dense(16, activation="relu", name="first")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def transformer():
    """Four heads of two channels and twelve hidden units; the embedding's channels stay."""
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(4, 2, name="attention")(inputs, inputs)
    x = layers.LayerNormalization(name="norm")(layers.Add(name="sum")([inputs, x]))
    y = layers.Dense(12, activation="gelu", name="up")(x)
    y = layers.Dense(8, name="down")(y)
    y = layers.Dense(3, name="head")(layers.Add(name="sum_2")([x, y]))
    return randomized(keras.Model(inputs, y, name="transformer"))


def compressed(model=None, structures=(), **params):
    algorithm = {
        "algorithm": "movement_sparsity",
        "params": WARMUP | params,
        "sparse_structure_by_scopes": list(structures),
    }
    model = network() if model is None else model
    return kc.compress_model(model, {"compression": algorithm}, verbose=False)


def data(samples=32):
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    return x, x[:, :4].argmax(-1).astype("int32")


def fitted(model, epochs, callbacks=()):
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss)
    x, y = data()
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics(), *callbacks]
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks).history


def masks(model):
    """Return {layer: `MovementMask` of its kernel}."""
    return {entry.layer.name: entry.mask for entry in model.config.algorithms[0].masked(model)}


def set_scores(model, seed=0):
    random = np.random.default_rng(seed)
    for mask in masks(model).values():
        mask.importance.assign(random.normal(size=mask.importance.shape))


def added_loss(model):
    return float(numpy(model.config.algorithms[0].loss(model, None, None)))


def move(model, epoch):
    model.config.algorithms[0].begin_epoch(model, epoch)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))
