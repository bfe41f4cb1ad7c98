"""The whole state of a training, written into a folder after every epoch, whole or not at all."""

import hashlib
import json
import pathlib
import shutil

import keras
import numpy as np

from keras_compress.compressed_model import facts_of, json_copy, set_facts
from keras_compress.whole_files import replacing

STATE = "accuracy_aware.json"
WEIGHTS = "accuracy_aware_{:04d}.npz"  # of an epoch
VERSION = 1


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
        self.run = json_copy(run)
        self.facts = {}  # name of a file of weights -> what `facts_of` gave
        self.stored = self._read()

    @property
    def record(self):
        """The record that was written last, or None."""
        return self.stored and self.stored["record"]

    def open(self):
        """Make the folder, and remove what a process left that was ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()

    def _read(self):
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            found, self.facts = stored["run"], stored["states"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected the state of an accuracy-aware training in '{path}'. Received: "
                f"{type(error).__name__}: {error}. Remove the folder to begin again."
            ) from None
        others = [what for what in self.run if found.get(what) != self.run[what]]
        if stored.get("version") != VERSION or others:
            raise ValueError(
                f"Expected a folder that is empty or holds the state of this training. Received: "
                f"folder={str(self.folder)!r}, where {', '.join(others) or 'the format'} differs. "
                "Give another folder, or remove this one to begin again."
            )
        return stored

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
        state = {"version": VERSION, "run": self.run, "states": self.facts, "record": record}
        text = json.dumps(state, default=float, indent=1)
        with replacing(self.folder / STATE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
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
