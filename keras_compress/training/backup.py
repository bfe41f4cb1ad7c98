"""The callback that lets a training which was killed go on as if it had not been."""

import pathlib
import shutil

import keras

from keras_compress.model_facts import quantizers_of
from keras_compress.records import ADVICE, read_record, write_record

RECORD = "backup.json"
STATE = "backup_{:04d}"  # of the epochs that are done
# What Keras' callbacks and `ExportIR` go by in later epochs.
NUMBERS = ("best", "best_epoch", "cooldown_counter", "wait")


class Backup(keras.callbacks.Callback):
    """Backs a training up after every epoch, and takes it up again when `fit` is called anew.

    Weights, masks, ranges, the optimizer, seeds of random layers, how far each algorithm is, and
    the numbers of other callbacks come back. So the resumed training gives bit for bit what the
    uninterrupted one would have given, where the data of an epoch depend on its number alone: see
    `docs/faults.md`.

    `keras.callbacks.BackupAndRestore` writes the state, into a new folder each time. A file that
    names it takes its place last: whenever the process ends, there is one whole backup.

    What is left out: an epoch in which activation ranges are still being read off the training
    data, and all epochs after `Compress(shrink=True)` has made the model smaller. They are trained
    again.

    Args:
        folder: folder for this callback alone; it is made where it is missing.
        callbacks: other callbacks of the same `fit` whose numbers come back: `best`, `best_epoch`,
            `wait` and `cooldown_counter`, which `ExportIR`, `ModelCheckpoint`, `EarlyStopping` and
            `ReduceLROnPlateau` go by. The best weights of `EarlyStopping` do not.
        delete: whether the backup goes when training has come to its end. If not, another call of
            `fit` gives the trained model back without training.

    Raises:
        NotADirectoryError: a file is in the way.
        TypeError: `callbacks` holds something else.
        ValueError: the folder holds the backup of another training, or none that can be read.

    Example:

    ```python
    export = kc.callbacks.ExportIR("best.xml")
    backup = kc.callbacks.Backup("backup", callbacks=[export])
    model.fit(data, epochs=40, callbacks=[kc.callbacks.Compress(), export, backup])
    ```
    """

    def __init__(self, folder, callbacks=(), delete=True):
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.callbacks = list(callbacks)
        self.delete = delete
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(
                f"Expected a folder for the backup. Received: folder={str(folder)!r}"
            )
        others = [each for each in self.callbacks if not isinstance(each, keras.callbacks.Callback)]
        if others:
            raise TypeError(f"Expected callbacks of Keras. Received: callbacks with {others[0]!r}")

    def on_train_begin(self, logs=None):
        self._begun = False
        self._epochs_done = None
        self._run = self._facts_of_run()
        self._stored = self._read()
        if self._stored is not None:
            self._keras_backup(self._stored["state"]).on_train_begin()

    def on_epoch_begin(self, epoch, logs=None):
        # Here, since all callbacks are done with the epoch before, whatever their order.
        if not self._begun:  # they have reset themselves when training began
            self._begun = True
            self._restore_numbers()
        elif self._epochs_done is not None:
            self._write(self._epochs_done)

    def on_epoch_end(self, epoch, logs=None):
        self._epochs_done = epoch + 1

    def on_train_end(self, logs=None):
        if not self.delete and self._epochs_done is not None:
            self._write(self._epochs_done)
        elif self.delete and self.folder.exists():
            (self.folder / RECORD).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _facts_of_run(self):
        """Return what makes a training another one, as JSON-able data."""
        model = self.model
        config = getattr(model, "config", None)
        return {
            "shapes": [list(variable.shape) for variable in model.weights],
            "configuration": config and config.to_dict(),
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
        }

    def _keras_backup(self, name):
        inner = keras.callbacks.BackupAndRestore(str(self.folder / name), delete_checkpoint=False)
        inner.set_model(self.model)
        return inner

    def _read(self):
        path = self.folder / RECORD
        stored = read_record(path, self._run, ("state", "numbers"), "backup")
        if stored is not None and not (self.folder / stored["state"]).is_dir():
            raise ValueError(
                f"Expected a folder '{stored['state']}' beside '{path}', which names it. Received: "
                f"none. {ADVICE}"
            )
        return stored

    def _write(self, epochs_done):
        observing = any(quantizer.observer is not None for quantizer in quantizers_of(self.model))
        if observing or self._facts_of_run()["shapes"] != self._run["shapes"]:
            return
        name = STATE.format(epochs_done)
        self._keras_backup(name).on_epoch_end(epochs_done - 1)
        numbers = [_numbers(callback) for callback in self.callbacks]
        write_record(self.folder / RECORD, self._run, {"state": name, "numbers": numbers})
        for path in self.folder.glob(STATE.format(0).replace("0000", "*")):
            if path.name != name:
                shutil.rmtree(path)

    def _restore_numbers(self):
        if self._stored is not None:
            for callback, numbers in zip(self.callbacks, self._stored["numbers"], strict=True):
                for name, value in numbers.items():
                    setattr(callback, name, value)


def _numbers(callback):
    """Return {name: number, or None} of what a callback goes by in later epochs."""
    values = {name: getattr(callback, name) for name in NUMBERS if hasattr(callback, name)}
    return {name: value if value is None else float(value) for name, value in values.items()}
