"""Networks, configurations and twins for the tests of sensitivity."""

import keras
import numpy as np
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc
from keras_compress.layers import FakeQuantize

NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
QUANTIZATION = {
    "algorithm": "quantization",
    "weights": {"bits": 2},
    "activations": {"bits": 3},
    "initializer": NO_ADAPTATION,
}
WEIGHTS = QUANTIZATION | {"activations": {"ignored_scopes": ["{re}."]}}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.5, "round_to": 1, "prune_first_conv": True},
    "initializer": NO_ADAPTATION,
}
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.7, "sparsity_level_setting_mode": "local"},
    "initializer": NO_ADAPTATION,
}
CONST = {"algorithm": "const_sparsity"}
BINARIZATION = {"algorithm": "binarization", "initializer": NO_ADAPTATION}
STAGED = QUANTIZATION | {"params": {"weights_quant_start_epoch": 2}}


def chain():
    """Three dense layers and a normalization."""
    inputs = keras.Input((6,), name="vector")
    x = layers.Dense(12, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(10, activation="relu", name="second")(x)
    return compiled(keras.Model(inputs, layers.Dense(4, name="head")(x), name="chain"))


def residual():
    """Convolutions of which two are added, and a layer behind data movement."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = short = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="inner")(x)
    x = layers.Conv2D(8, 3, padding="same", name="outer")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="add")([x, short]))
    x = layers.Flatten(name="flatten")(layers.MaxPooling2D(name="pool")(x))
    return compiled(keras.Model(inputs, layers.Dense(4, name="head")(x), name="residual"))


def compiled(model):
    """Compile as is quickest for a small network."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"], jit_compile=BACKEND == "jax")
    return model


def uncompiled(model):
    return keras.Model(model.input, model.output, name=model.name)


def samples(model, count=40):
    """Return inputs and the classes that the float model predicts: its accuracy is 1."""
    x = np.random.default_rng(0).normal(size=(count, *model.input.shape[1:])).astype("float32")
    return x, numpy(model(x)).argmax(axis=-1)


def config(*algorithms):
    return {"compression": list(algorithms)}


def scoped(names, *algorithms, key="target_scopes"):
    return config(*(each | {key: list(names)} for each in algorithms))


def final(model, configuration, data):
    """Compress through the public functions alone, with pruning and sparsity at their ends."""
    compressed = kc.compress_model(model, configuration, data=data, verbose=False)
    for algorithm in compressed.config.algorithms:
        if algorithm.adjustable:
            algorithm.set_rate(compressed, algorithm.final_rate)
    for quantizer in compressed.quantizers():
        quantizer.enable()
    return compressed


def give_ranges(model, source):
    """Give the activation quantizers of a model the ranges of those of the same name."""
    found = [layer for layer in model.layers if isinstance(layer, FakeQuantize)]
    for layer in found:
        other = source.get_layer(layer.name).quantizer
        layer.quantizer.signed = other.signed
        for variable, value in zip(
            layer.quantizer.range_variables, other.range_variables, strict=True
        ):
            variable.assign(np.array(numpy(value)))
    return model


class Recorder:
    """A metric that keeps all outputs, and is their distance from some given ones."""

    def __init__(self, x, reference):
        self.x, self.reference = x, reference
        self.outputs = []

    def __call__(self, model):
        self.outputs.append(numpy(model(self.x)))
        return float(np.square(self.outputs[-1] - self.reference).mean())
