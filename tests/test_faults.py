"""Processes that are killed, disks that are full: no file is ever half of something."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import fault_disk
import fault_training
import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from fault_training import BATCH, EPOCHS, data, digest

import keras_compress as kc
from keras_compress import whole_files
from keras_compress.model_facts import facts_of
from keras_compress.training.backup import RECORD, Backup
from keras_compress.training.checkpoints import variables_of
from keras_compress.whole_files import ENDING, replacing, replacing_if_local

HERE = pathlib.Path(__file__).parent
# So few steps run sooner than TensorFlow's graph of one is made; killed processes run that.
EAGER = BACKEND == "tensorflow"


def compressed(with_data):
    return fault_training.compressed(with_data, run_eagerly=EAGER)


def child(*command):
    """Run a script beside this file, under TensorFlow; return what it printed to its output."""
    quiet = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | quiet | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_trainings_end_as_the_one_that_was_not():
    """Four of the trials of `benchmarks/kill_and_resume.py`."""
    trials = [json.loads(line) for line in child("fault_trials.py", 4).splitlines()]
    assert sorted(trial["number"] for trial in trials) == list(range(4))
    for trial in trials:
        assert trial["phases"]  # it was killed
        assert (trial["corrupt"], trial["differs"], trial["left"]) == ([], "", [])


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return json.loads(child(fault_disk.__file__, folder, 100_000))


@pytest.mark.parametrize(
    "name", ["model.xml", "model.onnx", "model", "model.keras", "model.weights.h5", "model.html"]
)
def test_a_full_disk_is_one_error_and_changes_nothing(name, full_disk):
    kind, message, left = full_disk[name]
    assert kind == "OSError"
    assert message.startswith("[Errno 28] Expected room on the disk for '")
    assert f"{name}'" in message and "What stood under that name is as it was" in message
    wanted = {name} if "." in name else {name, "old"}
    assert set(left) - {".filler"} == wanted


def test_other_errors_stay_as_they_are(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="^iostream error$"), replacing(tmp_path / "model.xml"):
        raise RuntimeError("iostream error")
    monkeypatch.setattr(whole_files, "NEARLY_FULL", 1 << 62)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "model.xml"):
        raise RuntimeError("iostream error")
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """Stands for a kill: nothing of the library may handle it."""


@pytest.mark.parametrize("renames", range(5))
def test_a_pair_that_is_killed_is_never_of_two_outputs(tmp_path, monkeypatch, renames):
    target, replace, calls = tmp_path / "model.xml", os.replace, []
    for suffix in (".xml", ".bin"):
        target.with_suffix(suffix).write_text("old")

    def limited(source, destination):
        if len(calls) == renames:
            raise Killed
        calls.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", limited)
    try:
        with replacing(target, ".bin", ".xml") as temporary:
            for suffix in (".xml", ".bin"):
                temporary.with_suffix(suffix).write_text("new")
    except Killed:
        assert renames < 4
    if target.exists():
        assert target.read_text() == target.with_suffix(".bin").read_text()
    assert target.exists() == (renames in (0, 4))


@pytest.mark.parametrize("failing", range(4))
def test_a_pair_that_cannot_be_renamed_comes_back(tmp_path, monkeypatch, failing):
    target, replace, calls = tmp_path / "model.xml", os.replace, []
    for suffix in (".xml", ".bin"):
        target.with_suffix(suffix).write_text("old")

    def trouble(source, destination):
        calls.append(destination)
        if len(calls) == failing + 1:
            raise OSError("disk trouble")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", trouble)
    with (
        pytest.raises(OSError, match="disk trouble"),
        replacing(target, ".bin", ".xml") as temporary,
    ):
        for suffix in (".xml", ".bin"):
            temporary.with_suffix(suffix).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.xml": "old",
        "model.bin": "old",
    }


@pytest.mark.skipif(whole_files.fcntl is None, reason="this system has no locks of that kind")
def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path):
    abandoned = tmp_path / f".model-abc{ENDING}"
    abandoned.mkdir()
    (abandoned / "model.bin").write_text("half")
    others = [tmp_path / ".model-abc", tmp_path / f".other-abc{ENDING}"]
    for other in others:
        other.mkdir()
    with replacing(tmp_path / "model.xml") as first:
        assert not abandoned.exists()
        first.write_text("first")
        with replacing(tmp_path / "model.xml") as second:
            assert first.exists()
            second.write_text("second")
    assert (tmp_path / "model.xml").read_text() == "first"
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "model.xml"])


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_files, "fcntl", None)
    abandoned = tmp_path / f".model-abc{ENDING}"
    abandoned.mkdir()
    with replacing(tmp_path / "model.xml") as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == [abandoned, tmp_path / "model.xml"]


def test_a_file_that_will_not_fit_is_not_begun(tmp_path):
    with (
        pytest.raises(OSError, match="Expected room on the disk for .*No space left"),
        replacing_if_local(tmp_path / "model.weights.h5", size=1 << 62),
    ):
        raise AssertionError("the file was begun")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_replaced_is_left_to_keras(tmp_path):
    (tmp_path / "there").write_text("mine")
    stream = io.BytesIO()
    for path, overwrite in (
        (stream, True),
        ("gs://bucket/model.keras", True),
        (tmp_path / "missing" / "model.keras", True),
        (tmp_path / "there", False),
    ):
        with replacing_if_local(path, overwrite) as given:
            assert given is path
    with replacing_if_local(str(tmp_path / "new"), False) as given:
        assert given != tmp_path / "new" and given.name == "new"
        given.write_text("whole")
    assert (tmp_path / "new").read_text() == "whole"


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_a_model_that_cannot_be_saved_leaves_the_old_file(tmp_path, monkeypatch, name):
    model, path = compressed(with_data=True), tmp_path / name
    save = model.save if name == "model.keras" else model.save_weights
    save(path)
    before = path.read_bytes()
    monkeypatch.setattr(kc.CompressedModel, "save_own_variables", raises)
    with pytest.raises(RuntimeError, match="halfway"):
        save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [name]


def raises(*args):
    raise RuntimeError("halfway")


def test_shards_are_saved_as_keras_does(tmp_path):
    model, again = compressed(with_data=True), compressed(with_data=True)
    model.get_layer("head").bias.assign([1.0, 2.0, 3.0])
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1)
    again.load_weights(tmp_path / "model.weights.json")
    assert digest(again.weights) == digest(model.weights)


def state(model):
    """Return everything that a training can differ in."""
    return facts_of(model) | {"variables": digest(variables_of(model))}


def fit(model, *callbacks, epochs=EPOCHS):
    x, y = (array[: 3 * BATCH] for array in data())
    callbacks = [kc.callbacks.Compress(), *callbacks]
    model.fit(x, y, BATCH, epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model


class Dies(keras.callbacks.Callback):
    """Ends the process, as far as a test can, in the midst of an epoch."""

    def __init__(self, epoch, batch=1):
        super().__init__()
        self.at = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=[True, False], ids=["data", "no data"])
def uninterrupted(request):
    """Whether there were calibration data, and the state at the end."""
    return request.param, state(fit(compressed(request.param)))


@pytest.mark.parametrize("kind", ["Backup", "BackupAndRestore"])
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path, uninterrupted, kind):
    with_data, expected = uninterrupted

    def backup():
        if kind == "Backup":
            return Backup(tmp_path / "backup")
        return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    with pytest.raises(KeyboardInterrupt):
        fit(compressed(with_data), backup(), Dies(2))
    assert list((tmp_path / "backup").iterdir())
    resumed = fit(compressed(with_data), backup())
    assert state(resumed) == expected
    assert not (tmp_path / "backup").exists()


def test_numbers_of_other_callbacks_come_back(tmp_path):
    def callbacks():
        lower = keras.callbacks.ReduceLROnPlateau("loss", patience=9, min_delta=9.0)
        best = keras.callbacks.ModelCheckpoint(
            str(tmp_path / "best.keras"), "loss", save_best_only=True
        )
        return lower, best, Backup(tmp_path / "backup", callbacks=[lower, best], delete=False)

    whole = callbacks()[:2]
    fit(compressed(True), *whole)
    with pytest.raises(KeyboardInterrupt):
        fit(compressed(True), *callbacks(), Dies(2))
    resumed = callbacks()
    fit(compressed(True), *resumed)
    assert resumed[0].wait == whole[0].wait == EPOCHS - 1
    assert resumed[0].best == whole[0].best
    assert resumed[1].best == whole[1].best


def test_a_training_that_is_through_gives_its_model_back(tmp_path):
    folder = tmp_path / "backup"
    model = fit(compressed(True), Backup(folder, delete=False))
    again = fit(compressed(True), Backup(folder, delete=False), Dies(0))
    assert facts_of(again) == facts_of(model)
    assert digest(again.weights) == digest(model.weights)
    assert digest(again.optimizer.variables) == digest(model.optimizer.variables)


def test_a_plain_model_is_backed_up_too(tmp_path):
    def plain():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile("adam", "mse")
        return model

    def train(model, *callbacks):
        x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
        model.fit(x, x[:, :3], 4, 3, shuffle=False, verbose=0, callbacks=list(callbacks))
        return model

    with pytest.raises(KeyboardInterrupt):
        train(plain(), Backup(tmp_path / "backup"), Dies(2, 1))
    resumed = train(plain(), Backup(tmp_path / "backup"))
    assert digest(variables_of(resumed)) == digest(variables_of(train(plain())))


def test_an_epoch_that_is_still_calibrating_is_not_backed_up(tmp_path):
    """24 samples are wanted, and an epoch of two batches has 16."""
    model, found = compressed(with_data=False), []
    seen = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: found.append((tmp_path / "backup").exists())
    )
    x, y = data()
    callbacks = [kc.callbacks.Compress(), Backup(tmp_path / "backup"), seen]
    model.fit(x[:16], y[:16], BATCH, 3, shuffle=False, verbose=0, callbacks=callbacks)
    assert found == [False, False, True]


def test_a_model_that_became_smaller_is_trained_again_from_the_last_backup(tmp_path):
    config = {"compression": fault_training.CONFIG["compression"][:1]}

    def pruned(*callbacks):
        keras.utils.set_random_seed(1)
        model = kc.compress_model(fault_training.network(), config, verbose=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=EAGER)
        x, y = (array[: 2 * BATCH] for array in data())
        callbacks = [kc.callbacks.Compress(shrink=True), *callbacks]
        model.fit(x, y, BATCH, 5, shuffle=False, verbose=0, callbacks=callbacks)
        return model

    expected = pruned()
    assert expected.get_layer("second").filters < 8
    with pytest.raises(KeyboardInterrupt):
        pruned(Backup(tmp_path / "backup"), Dies(4))
    resumed = pruned(Backup(tmp_path / "backup"))
    assert digest(variables_of(resumed)) == digest(variables_of(expected))


def test_backups_of_another_training_are_refused(tmp_path):
    folder = tmp_path / "backup"
    model = compressed(True)
    fit(model, Backup(folder, delete=False), epochs=2)
    record = (folder / RECORD).read_text()

    def refused(match, *callbacks, model=model):
        with pytest.raises(ValueError, match=match):
            fit(model, Backup(folder, *callbacks))

    other = kc.compress_model(
        fault_training.network(),
        {"compression": {"algorithm": "quantization"}},
        data()[0],
        verbose=False,
    )
    other.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    refused("which differs in: shapes, configuration. Give another folder", model=other)
    refused("which differs in: callbacks", [keras.callbacks.ReduceLROnPlateau("loss")])
    for text in ("{", "[]", "{}", json.dumps({"run": {}})):
        (folder / RECORD).write_text(text)
        refused("Expected the backup in .*remove this one to begin again")
    (folder / RECORD).write_text(record.replace('"version": 1', '"version": 2'))
    refused("which differs in: format")
    (folder / RECORD).write_text(record)
    shutil.rmtree(next(folder.glob("backup_0*")))
    refused("Expected a folder 'backup_0002' beside .*Received: none. Give another folder")


def test_what_is_no_folder_and_no_callback_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="Expected a folder for the backup. Received"):
        Backup(tmp_path / "file")
    with pytest.raises(TypeError, match="Expected callbacks of Keras. Received: callbacks with 3"):
        Backup(tmp_path / "backup", callbacks=[3])


def test_a_file_of_weights_holds_the_whole_state(tmp_path):
    model = fit(compressed(with_data=False), epochs=2)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = compressed(with_data=False)
    assert not all(quantizer.calibrated for quantizer in fresh.quantizers())
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert facts_of(fresh) == facts_of(model)
    x = data()[0]
    np.testing.assert_array_equal(fresh.predict(x, verbose=0), model.predict(x, verbose=0))
    seeds = [digest(each.get_layer("dropout").variables) for each in (fresh, model)]
    assert seeds[0] == seeds[1] != digest(compressed(True).get_layer("dropout").variables)


def test_weights_of_earlier_versions_load_and_those_of_other_models_do_not(tmp_path, monkeypatch):
    model = compressed(with_data=True)
    with monkeypatch.context() as patch:
        patch.setattr(kc.CompressedModel, "save_own_variables", lambda self, store: None)
        model.save_weights(tmp_path / "earlier.weights.h5")
    model.progress["epoch"] = 7
    model.load_weights(tmp_path / "earlier.weights.h5")
    assert model.progress["epoch"] == 7
    algorithms, store = fault_training.CONFIG["compression"][:2], {}
    other = kc.compress_model(fault_training.network(), {"compression": algorithms}, verbose=False)
    model.save_own_variables(store)
    with pytest.raises(ValueError, match="a model with 0 quantizers.*Received: that of one with"):
        other.load_own_variables(store)
