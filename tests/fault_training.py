"""A small training with everything that writes files, for tests that kill it.

`python tests/fault_training.py FOLDER` trains once. `fault_trials.py` forks, kills and compares.
"""

import hashlib
import json
import pathlib
import sys

import keras
import numpy as np

import keras_compress as kc
from keras_compress.model_facts import facts_of
from keras_compress.training.checkpoints import variables_of
from keras_compress.whole_files import replacing

EPOCHS, STEPS, BATCH = 4, 6, 8
CONFIG = {
    "input_info": {"sample_size": [1, 8, 8, 3]},
    "compression": [
        {
            "algorithm": "filter_pruning",
            "params": {"pruning_target": 0.5, "pruning_steps": 2, "round_to": 1},
        },
        {
            "algorithm": "magnitude_sparsity",
            "params": {
                "schedule": "polynomial",
                "sparsity_target": 0.6,
                "sparsity_target_epoch": 3,
                "sparsity_freeze_epoch": 3,
                "update_per_optimizer_step": True,
                "steps_per_epoch": STEPS,
            },
        },
        {
            "algorithm": "quantization",
            "initializer": {
                "range": {"num_init_samples": 3 * BATCH},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
            },
        },
    ],
}


def data():
    random = np.random.default_rng(3)
    x = random.normal(size=(STEPS * BATCH, 8, 8, 3)).astype("float32")
    return x, (np.abs(x).mean(axis=(1, 2)).argmax(axis=1)).astype("int32")


def network():
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(8, 3, name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Conv2D(8, 3, activation="relu", name="second")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = keras.layers.Dropout(0.2, seed=5, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="network")


def compressed(with_data, **compile_options):
    keras.utils.set_random_seed(1)
    model = kc.compress_model(network(), CONFIG, data()[0] if with_data else None, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], **compile_options)
    return model


class SavedModel(keras.callbacks.Callback):
    """Exports a SavedModel directory and a report after the third epoch and the last."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        if epoch in (2, EPOCHS - 1):
            kc.export(self.model, self.folder / "deployed", data=data()[0][:4])


class Recorder(keras.callbacks.Callback):
    """Notes what stands under the final names after every epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.found = []

    def on_epoch_end(self, epoch, logs=None):
        self.found.append(contents(self.folder))

    def on_train_end(self, logs=None):
        (self.folder / "recorded.json").write_text(json.dumps(self.found))


def train(folder, with_data=True, record=False):
    """Train to the end, from where an earlier process left off, and write `final.json`."""
    folder = pathlib.Path(folder)
    model = compressed(with_data)
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(folder / "best.keras"), monitor="loss", save_best_only=True
    )
    export = kc.callbacks.ExportIR(folder / "best.xml", monitor="loss", verify=False)
    callbacks = [
        kc.callbacks.Compress(),
        kc.callbacks.Statistics(),
        checkpoint,
        export,
        SavedModel(folder),
        *([Recorder(folder)] if record else []),
        kc.callbacks.Backup(folder / "backup", callbacks=[checkpoint, export]),
    ]
    x, y = data()
    model.fit(x, y, BATCH, EPOCHS, shuffle=False, verbose=0, callbacks=callbacks)
    facts = facts_of(model) | {"variables": digest(variables_of(model))}
    facts["files"] = contents(folder)
    with replacing(folder / "final.json") as temporary:
        temporary.write_text(json.dumps(facts))


def digest(variables):
    """Return one text that stands for the exact values of variables, in their order."""
    found = hashlib.sha256()
    for variable in variables:
        found.update(keras.ops.convert_to_numpy(variable).tobytes())
    return found.hexdigest()


def contents(folder):
    """Return {final name: what it holds} of whole files; raise where one is not."""
    found = {}
    path = folder / "best.keras"
    if path.exists():
        model = keras.models.load_model(path)
        found["best.keras"] = [digest(variables_of(model)), facts_of(model)["progress"]]
    path = folder / "best.xml"
    if path.exists():
        import openvino as ov

        core = ov.Core()
        compiled = core.compile_model(core.read_model(path), "CPU")
        weights = hashlib.sha256(path.with_suffix(".bin").read_bytes()).hexdigest()
        # Names of operations, in the .xml, count the exports of a process: outputs stand for it.
        found["best.xml"] = [weights, compiled(data()[0][:4])[0].tolist()]
    path = folder / "deployed"
    if path.exists():
        import tensorflow as tf

        outputs = tf.saved_model.load(str(path)).signatures["serving_default"](
            image=tf.constant(data()[0][:4])
        )
        found["deployed"] = [next(iter(outputs.values())).numpy().tolist()]
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    return found


if __name__ == "__main__":
    train(sys.argv[1])
