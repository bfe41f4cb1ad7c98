"""A network that is small enough to be trained in many ways, and what was seen while it was."""

import types

import keras
import numpy as np
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.model_facts import transforms_of

BATCH, STEPS = 8, 6  # batches in an epoch
X = np.random.default_rng(0).normal(size=(BATCH * STEPS, 6, 6, 1)).astype("float32")
Y = (X.mean((1, 2, 3)) > 0).astype("int32") + (X[:, 0, 0, 0] > 0)

QUANTIZATION = {
    "algorithm": "quantization",
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
}
STAGED = QUANTIZATION | {
    "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2}
}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {
        "pruning_target": 0.5,
        "pruning_steps": 3,
        "round_to": 1,
        "prune_first_conv": True,
    },
}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.0,
    "params": {"schedule": "polynomial", "power": 1, "sparsity_target": 0.6}
    | {"sparsity_target_epoch": 3},
}
RANDOM = {
    "algorithm": "rb_sparsity",
    "sparsity_init": 0.05,
    "params": {"schedule": "polynomial", "sparsity_target": 0.5, "sparsity_target_epoch": 3},
}
BINARY = {"algorithm": "binarization", "mode": "xnor"}
CASES = {
    "grids": [PRUNING, MAGNITUDE, STAGED],
    "signs": [PRUNING, BINARY],
    "drawn": [RANDOM, QUANTIZATION],
}


def network(norm=True, **policy):
    """Return two convolutions and a head in float32, each with the dtype policy, if any."""
    inputs = keras.Input((6, 6, 1), name="image")
    x = layers.Conv2D(6, 3, name="first", use_bias=not norm, **policy)(inputs)
    if norm:
        x = layers.BatchNormalization(momentum=0.9, name="norm", **policy)(x)
    x = layers.ReLU(name="relu", **policy)(x)
    x = layers.Conv2D(6, 3, activation="relu", name="second", **policy)(x)
    x = layers.GlobalAveragePooling2D(name="pool", **policy)(x)
    return keras.Model(inputs, layers.Dense(3, dtype="float32", name="head")(x), name="net")


def compressed(*algorithms, model=None, data=X):
    """Return the network compressed, from the same weights in every call."""
    if model is None:
        keras.utils.set_random_seed(0)
        model = network()
    return kc.compress_model(model, {"compression": list(algorithms)}, data=data, verbose=False)


def counted_loss():
    """Return a loss and the list that it adds to when Python runs it: while it is traced."""
    calls = []

    def loss(y, logits):
        calls.append(1)
        return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    return loss, calls


def state_of(model):
    """Return {index: array} of what the transforms hold that is a mask or a switch."""
    states = [v for transform in transforms_of(model) for v in transform.non_trainable_variables]
    return {index: numpy(variable).copy() for index, variable in enumerate(states)}


class Watch(keras.callbacks.Callback):
    """Notes what there is at the end of every epoch; on JAX `self.model` alone is up to date."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.traces, self.states = calls, [], []

    def on_epoch_end(self, epoch, logs=None):
        self.traces.append(len(self.calls))
        self.states.append(state_of(self.model))


def fitted(model, optimizer=None, epochs=4, weights=None, more=(), **compile_arguments):
    """Train a model on the data in their order; return it with what was seen of every epoch."""
    loss, calls = counted_loss()
    optimizer = optimizer or keras.optimizers.Adam(2e-3)
    model.compile(optimizer, loss, **compile_arguments)
    watch = Watch(calls)
    history = model.fit(
        X,
        Y,
        batch_size=BATCH,
        epochs=epochs,
        sample_weight=weights,
        shuffle=False,
        verbose=0,
        callbacks=[kc.callbacks.Compress(), watch, *more],
    ).history
    return types.SimpleNamespace(
        model=model, loss=history["loss"], traces=watch.traces, states=watch.states
    )
