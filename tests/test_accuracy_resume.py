"""Accuracy-aware training that is ended and taken up again, by the same process or another."""

import json
import os
import subprocess
import sys

import accuracy_helpers
import keras
import numpy as np
import pytest
from accuracy_helpers import (
    MAGNITUDE,
    PRUNING,
    QUANTIZATION,
    Dies,
    compressed,
    data,
    fitted,
    run,
    same,
    trained,
    weights,
)

from keras_compress.training import checkpoints as checkpoints_module
from keras_compress.training.checkpoints import STATE, Checkpoints

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.02, 10, 0.9)


def ended(folder, weights_path, killed_in):
    command = [sys.executable, accuracy_helpers.__file__, folder, weights_path, str(killed_in)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_killed_process_resumes_to_the_same_result(tmp_path):
    """Killed in the midst of the epoch that follows a change of the rate, and in that after it."""
    folder, path = str(tmp_path / "state"), str(tmp_path / "weights.npz")
    model, expected = run(str(tmp_path / "other"))
    code, error = ended(folder, path, 3)
    assert code == 9, error
    record = json.loads((tmp_path / "state" / STATE).read_text())["record"]
    assert len(record["epochs"]) == 3 and not os.path.exists(path)
    code, error = ended(folder, path, 99)
    assert code == 0, error
    with np.load(path) as found:
        assert same(weights(model), [found[name] for name in found.files])
    with open(f"{path}.json", encoding="utf-8") as stream:
        assert json.load(stream) == json.loads(json.dumps(expected.to_dict()))


def hawq(tmp_path):
    traces = {"first/kernel": 0.1, "second/kernel": 0.02, "head/kernel": 0.3}
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(traces))
    precision = {"type": "hawq", "budget": {"bytes": 10_000}, "traces_per_layer_path": str(path)}
    return {"algorithm": "quantization", "initializer": {"precision": precision}}


@pytest.fixture(scope="module")
def original():
    return trained(epochs=5)


@pytest.mark.parametrize(
    "kind",
    [
        "schedule",
        "widths",
        pytest.param("sparsity", marks=pytest.mark.slow),
        pytest.param("early exit", marks=pytest.mark.slow),
    ],
)
def test_an_ended_training_resumes_to_the_same_result(kind, original, tmp_path):
    algorithms, arguments = {
        "sparsity": ([MAGNITUDE], {"initial_training_phase_epochs": 0}),
        "schedule": (
            [MAGNITUDE, QUANTIZATION],
            {"learning_rate": SCHEDULE, "initial_training_phase_epochs": 1},
        ),
        "widths": ([hawq(tmp_path)], {"initial_compression_rate_step": 0.3}),
        "early exit": (
            [PRUNING],
            {
                "mode": "early_exit",
                "maximal_absolute_accuracy_degradation": -1.0,
                "maximal_total_epochs": 4,
            },
        ),
    }[kind]
    models, results = [], []
    for dies in (None, 3):
        folder = tmp_path / str(dies)
        model = compressed(original, *algorithms, **arguments)
        if dies:
            with pytest.raises(KeyboardInterrupt):
                fitted(model, folder=folder, callbacks=[Dies(dies)])
            model = compressed(original, *algorithms, **arguments)
        results.append(fitted(model, folder=folder))
        models.append(model)
    assert len(results[0].epochs) > 3  # or nothing would have been resumed
    assert results[0].to_dict() == results[1].to_dict()
    assert same(weights(models[0]), weights(models[1]))
    assert models[0].progress == models[1].progress
    assert models[0].config == models[1].config
    again = compressed(original, *algorithms, **arguments)
    seen = Counts()
    assert fitted(again, folder=folder, callbacks=[seen]).to_dict() == results[1].to_dict()
    assert seen.epochs == 0  # a training that came to its end gives its result back at once
    assert same(weights(again), weights(models[1]))
    assert again.config == models[1].config
    x = data()[0]
    assert same([again.predict(x, verbose=0)], [models[1].predict(x, verbose=0)])


class Counts(keras.callbacks.Callback):
    """Counts what it is told."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs += 1


def test_the_folder_holds_one_whole_state(original, tmp_path):
    model = compressed(original, MAGNITUDE)
    folder = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        fitted(model, folder=folder, callbacks=[Dies(4)])
    named = set(json.loads((folder / STATE).read_text())["states"])
    assert {path.name for path in folder.iterdir()} == named | {STATE}
    assert 1 <= len(named) <= 2  # the last one and the best one
    # What a process that is killed while it writes leaves behind goes with the next start.
    (folder / "accuracy_aware_0099.npz").write_bytes(b"half")
    (folder / ".accuracy_aware-1").mkdir()
    (folder / "notes.txt").write_text("mine")
    fitted(compressed(original, MAGNITUDE), folder=folder)
    named = set(json.loads((folder / STATE).read_text())["states"])
    assert {path.name for path in folder.iterdir()} == named | {STATE, "notes.txt"}


def test_another_training_is_not_taken_up(original, tmp_path):
    fitted(compressed(original, MAGNITUDE, maximal_total_epochs=2), folder=tmp_path)
    before = (tmp_path / STATE).read_text()
    changes = {
        "differs in: configuration": (compressed(original, MAGNITUDE), {}),
        "differs in: baseline": (
            compressed(original, MAGNITUDE, maximal_total_epochs=2),
            {"baseline": 0.5},
        ),
        "differs in: seed": (compressed(original, MAGNITUDE, maximal_total_epochs=2), {"seed": 1}),
    }
    for message, (model, arguments) in changes.items():
        with pytest.raises(ValueError, match=message):
            fitted(model, folder=tmp_path, **arguments)
    assert (tmp_path / STATE).read_text() == before


def test_folders_that_hold_no_state(original, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    model = compressed(original, MAGNITUDE)
    with pytest.raises(NotADirectoryError, match="Expected a folder"):
        fitted(model, folder=file)
    for text in ("{", "[]", "{}"):
        (tmp_path / STATE).write_text(text)
        with pytest.raises(ValueError, match="Expected the state of an accuracy-aware training"):
            Checkpoints(tmp_path, {})


def test_types_without_a_name_in_numpy_come_back(original, tmp_path, monkeypatch):
    model = compressed(original, MAGNITUDE)
    extra = keras.Variable(np.arange(3.0), dtype="bfloat16", name="extra")
    model.optimizer.build(model.trainable_variables)
    variables = [extra]
    monkeypatch.setattr(checkpoints_module, "variables_of", lambda model: variables)
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.open()
    checkpoints.write(model, "accuracy_aware_0000.npz", [], {})
    extra.assign(np.zeros(3))
    assert not checkpoints.restore(model, "accuracy_aware_0000.npz")
    assert keras.ops.convert_to_numpy(extra).astype("float32").tolist() == [0, 1, 2]


def test_without_a_seed_random_generators_are_left_alone(original, monkeypatch):
    model = compressed(original, MAGNITUDE, maximal_total_epochs=2)
    drawn = []
    monkeypatch.setattr(keras.utils, "set_random_seed", drawn.append)
    fitted(model, seed=None)
    assert drawn == []
    fitted(model, seed=3)
    assert drawn == [3, 3, 4, 4]  # before the data are looked at, and before they are shuffled
