"""The whole state of a training, written into a folder after every epoch, whole or not at all."""

import hashlib
import json
import pathlib
import shutil

import keras
import numpy as np

from keras_compress.model_facts import facts_of, set_facts
from keras_compress.records import read_record, write_record
from keras_compress.whole_files import replacing

STATE = "accuracy_aware.json"
KIND = "state of an accuracy-aware training"
WEIGHTS = "accuracy_aware_{:04d}.npz"  # of an epoch


def variables_of(model):
    """Return all variables of a compiled model and its optimizer, seeds of random layers too."""
    return [*model.variables, *model.optimizer.variables]


def write_weights(path, model):
    """Write all variables of a compiled model into an `.npz` file."""
    arrays = [keras.ops.convert_to_numpy(variable) for variable in variables_of(model)]
    with replacing(path) as temporary:
        np.savez(temporary, **{str(index): array for index, array in enumerate(arrays)})


def read_weights(path, model):
    """Give a compiled model the variables that `write_weights` wrote."""
    with np.load(path) as stored:
        for index, variable in enumerate(variables_of(model)):
            value = stored[str(index)]
            if value.dtype.kind == "V":  # a type that NumPy has no name for, such as bfloat16
                value = value.view(keras.ops.convert_to_numpy(variable).dtype)
            variable.assign(value)


class Checkpoints:
    """A folder with the state of one training: `accuracy_aware.json`, and files of weights.

    Weights are written first. The JSON file, which names them, takes its place last, and files
    that it names no more are deleted after that: whenever the process ends, the folder holds one
    whole state.

    Args:
        folder: path; it is made where it is missing.
        run: dict of what makes a training another one, {what: JSON-able value}.

    Raises:
        NotADirectoryError: a file is in the way.
        ValueError: the folder holds the state of another training, or no state that can be read.
    """

    def __init__(self, folder, run):
        self.folder = pathlib.Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(
                f"Expected a folder for the state of the training. Received: folder={str(folder)!r}"
            )
        self.run = run
        keys = ("states", "record")
        self.stored = read_record(self.folder / STATE, self.run, keys, KIND)
        # Name of a file of weights -> what `facts_of` gave.
        self.facts = {} if self.stored is None else self.stored["states"]

    @property
    def record(self):
        """The record that was written last, or None."""
        return self.stored and self.stored["record"]

    def open(self):
        """Make the folder, and remove what a process left that was ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()

    def write(self, model, name, keep, record):
        """Write the state after an epoch.

        Args:
            model: the compiled model.
            name: name for this state; None: no new one.
            keep: names of the states to keep beside it.
            record: JSON-able dict, given back as `record`.
        """
        if name is not None:
            write_weights(self.folder / name, model)
            self.facts[name] = facts_of(model)
        self.facts = {each: self.facts[each] for each in (*keep, name) if each is not None}
        write_record(self.folder / STATE, self.run, {"states": self.facts, "record": record})
        self._remove_stale()

    def restore(self, model, name):
        """Give a compiled model a state that was written.

        Returns whether compiled functions have to be made anew.
        """
        changed = set_facts(model, self.facts[name])
        read_weights(self.folder / name, model)
        return changed

    def _remove_stale(self):
        for path in self.folder.glob(WEIGHTS.format(0).replace("0000", "*")):
            if path.name not in self.facts:
                path.unlink()
        for path in self.folder.glob(f".{pathlib.Path(STATE).stem}*"):  # of a process that ended
            shutil.rmtree(path, ignore_errors=True)


def fingerprint(model):
    """Return a short text that differs between models whose variables have other shapes or types.

    Names do not count: Keras numbers layers through within a process.
    """
    rows = [[list(v.shape), str(v.dtype)] for v in variables_of(model)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
