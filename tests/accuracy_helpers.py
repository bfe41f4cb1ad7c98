"""A tiny classifier to train within an accuracy budget, also as a process of its own to be killed.

python accuracy_helpers.py FOLDER WEIGHTS KILLED_IN
"""

import json
import os
import sys

import keras
import numpy as np
from keras import layers

import keras_compress as kc
from keras_compress.accuracy_aware_fit import accuracy_aware_fit

# So few steps run sooner than TensorFlow's graph of one is made.
EAGER = keras.backend.backend() == "tensorflow"
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"round_to": 1, "pruning_target": 0.3, "pruning_steps": 2},
}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.3, "sparsity_target_epoch": 1},
}
QUANTIZATION = {"algorithm": "quantization"}
ADAPTIVE = {
    "maximal_absolute_accuracy_degradation": 0.05,
    "initial_training_phase_epochs": 2,
    "patience_epochs": 0,
    "maximal_total_epochs": 6,
}


def data(samples=64, seed=0):
    """Points around four corners, and which corner it is."""
    random = np.random.default_rng(seed)
    y = np.arange(samples) % 4
    corners = np.stack([y % 2, y // 2, 1 - y % 2, 1 - y // 2], axis=-1)
    return (corners + random.normal(0, 0.2, corners.shape)).astype("float32"), y.astype("int32")


def network():
    inputs = keras.Input((4,), name="point")
    x = layers.Dense(12, name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.5, name="norm")(x))
    x = layers.Dropout(0.1, seed=1)(x)
    x = layers.Dense(12, activation="relu", name="second")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="corners")


def compiled(model, learning_rate=0.01, eager=EAGER):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, loss, metrics=["accuracy"], run_eagerly=eager)
    return model


def trained(seed=0, epochs=15):
    """The original: a float network that has learnt its task."""
    keras.utils.set_random_seed(seed)
    model = compiled(network(), 0.02)
    model.fit(*data(), batch_size=16, epochs=epochs, verbose=0)
    return model


def config(*algorithms, mode="adaptive_compression_level", **params):
    defaults = ADAPTIVE if mode == "adaptive_compression_level" else {}
    training = {"mode": mode, "params": defaults | params}
    return {"compression": list(algorithms), "accuracy_aware_training": training}


def compressed(original, *algorithms, learning_rate=0.01, eager=EAGER, **arguments):
    model = kc.compress_model(original, config(*algorithms, **arguments), data(), verbose=False)
    return compiled(model, learning_rate, eager)


def fitted(model, baseline=1.0, **arguments):
    arguments = {"validation_data": data(32, 1), "batch_size": 16, "verbose": False} | arguments
    return accuracy_aware_fit(model, *data(), baseline=baseline, **arguments)


def weights(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]


def same(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


class Dies(keras.callbacks.Callback):
    """Ends training, or the whole process, in the midst of an epoch."""

    def __init__(self, epoch, batch=2, process=False):
        super().__init__()
        self.at, self.process, self.epoch = (epoch, batch), process, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            if self.process:
                os._exit(9)
            raise KeyboardInterrupt


def run(folder, callbacks=()):
    """The training whose process is killed: pruning and quantization with dropout."""
    model = compressed(trained(epochs=3), PRUNING, QUANTIZATION)
    return model, fitted(model, baseline=0.97, folder=folder, callbacks=list(callbacks))


def main(folder, path, killed_in):
    model, result = run(folder, [Dies(int(killed_in), process=True)])
    np.savez(path, *weights(model))
    with open(f"{path}.json", "w", encoding="utf-8") as stream:
        json.dump(result.to_dict(), stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
