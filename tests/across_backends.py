"""A model that is trained on one Keras backend, and the process of another that goes on with it.

As a program, `python across_backends.py TASK FOLDER ...`, this file is the other process: `TASK`
is `go_on` or `export`, and in each folder lies a model.
"""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
from keras import layers

import keras_compress as kc

MODEL, CONTINUED = "model.keras", "continued.keras"
FORMATS = (".xml", ".onnx", "")
SAVED_AFTER, EPOCHS, BATCH = 2, 5, 8  # schedules and switches move until epoch 4
PRUNING = {"pruning_target": 0.5, "pruning_steps": 4, "round_to": 1, "prune_first_conv": True}
SPARSITY = {"sparsity_target": 0.75, "sparsity_target_epoch": 4}
SWITCHES = {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 3}
ALGORITHMS = {
    "masked": [
        {"algorithm": "filter_pruning", "params": PRUNING},
        {"algorithm": "magnitude_sparsity", "params": SPARSITY},
        {"algorithm": "quantization", "weights": {"bits": 4}},
    ],
    "drawn": [
        {"algorithm": "rb_sparsity", "params": SPARSITY},
        {"algorithm": "quantization", "params": SWITCHES},
    ],
}


def data():
    random = np.random.default_rng(0)
    return random.normal(size=(32, 6, 6, 3)).astype("float32"), random.integers(0, 3, 32)


def network():
    inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Flatten(name="flat")(layers.DepthwiseConv2D(3, name="second")(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="network")


def compressed(algorithms):
    config = {"target_device": "TRIAL", "compression": algorithms}
    return kc.compress_model(network(), config, data=data()[0], verbose=False)


def trained(algorithms, folder):
    """Return a model in the midst of its schedules, which is also saved in the folder."""
    keras.utils.set_random_seed(0)
    model = compressed(algorithms)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    fit(model, 0, SAVED_AFTER)
    model.save(folder / MODEL)
    return model


def fit(model, first, last):
    """Train the epochs from `first` to `last`; return what `fit` logs."""
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    return model.fit(*data(), initial_epoch=first, epochs=last, **options).history


def go_on(model):
    """Return (arrays before training goes on, arrays after it, what is logged and counted)."""
    before = arrays_of(model)
    history = fit(model, SAVED_AFTER, EPOCHS)
    steps = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    told = {"progress": model.progress, "steps": steps, "history": history}
    return before, arrays_of(model), json.loads(json.dumps(told))


def arrays_of(model):
    """Return the state of a model, and what it gives for the data: {name: array}."""
    arrays = {f"weight {v.path}": v for v in model.weights}
    arrays |= {f"optimizer {i}": v for i, v in enumerate(model.optimizer.variables)}
    for index, quantizer in enumerate(model.quantizers()):
        arrays[f"range {index}"] = np.stack(quantizer.effective_range())
    arrays["outputs"] = model.predict(data()[0], verbose=0)
    return {name: np.asarray(keras.ops.convert_to_numpy(value)) for name, value in arrays.items()}


def export(folder):
    """Export the model in a folder in every format, into one of this backend's name."""
    model = keras.models.load_model(folder / MODEL, compile=False)
    into = folder / f"exported-{keras.backend.backend()}"
    into.mkdir()
    for suffix in FORMATS:
        kc.export(model, into / f"model{suffix}", verify=False)


def in_process_of(backend, task, folders):
    """Run a task in a process whose Keras runs on another backend; what it says is an error."""
    result = subprocess.run(
        [sys.executable, __file__, task, *map(str, folders)],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _go_on(folder):
    model = keras.models.load_model(folder / MODEL)
    before, after, told = go_on(model)
    into = folder / keras.backend.backend()
    into.mkdir()
    np.savez(into / "before.npz", **before)
    np.savez(into / "after.npz", **after)
    (into / "told.json").write_text(json.dumps(told))
    model.save(into / CONTINUED)


if __name__ == "__main__":
    task = {"go_on": _go_on, "export": export}[sys.argv[1]]
    for each in sys.argv[2:]:
        task(pathlib.Path(each))
