"""Callbacks that move compression along with `model.fit`."""

import math
import pathlib

import keras

from keras_compress.compressed_model import quantizers_of
from keras_compress.shrink import shrink_in_place


def _algorithms(model):
    algorithms = getattr(getattr(model, "config", None), "algorithms", None)
    if algorithms is None:
        raise ValueError(
            "Expected a model made by `keras_compress.compress_model`. "
            f"Received: model '{model.name}' (of type {type(model).__name__})"
        )
    return algorithms


class Compress(keras.callbacks.Callback):
    """Moves every algorithm of a compressed model along with the optimizer's step.

    It reads its configuration from the model. The clock is `optimizer.iterations`, which survives
    saving and resuming; epochs are counted by it too, where the number of steps in one is known.

    While an algorithm still reads the first training batches (activation ranges of a model that
    was compressed without `data`), training runs eagerly; the compiled step takes over afterwards.

    Args:
        shrink: whether channels are removed during training, as soon as the pruning masks are
            final: the epochs that follow train the smaller model, and are faster. Callbacks that
            keep weights of the larger model, such as `EarlyStopping(restore_best_weights=True)`,
            must not outlive that moment.

    Raises:
        ValueError: if the model is not a compressed one.
    """

    def __init__(self, shrink=False):
        super().__init__()
        self.shrink = shrink

    def set_model(self, model):
        super().set_model(model)
        self._moving = [algorithm for algorithm in _algorithms(model) if algorithm.built]
        self._eager_by_user = model.run_eagerly
        self._paused = []
        self._training = False
        self._epoch = 0
        self._next_epoch_at = None  # batch of this epoch, where it is not the end
        self._steps = None  # optimizer's steps in an epoch, once that is known
        # Before `fit` makes its training step: what observes must be in it from the first batch.
        self._step(model)

    def on_train_begin(self, logs=None):
        self._training = True

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._first_step = self._done(self.model)
        # Resumed in the midst of an epoch, the next one by the optimizer's clock begins at a batch
        # of this one. Else no batch has to read the clock, which stalls the device.
        length = self._epoch_length()
        passed = self._first_step % length if length else 0
        self._next_epoch_at = length - passed if passed else None
        self._begin_epoch(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if self._steps is None:
            self._steps = max(self._done(self.model) - self._first_step, 1)

    def on_train_batch_begin(self, batch, logs=None):
        if self._next_epoch_at is not None and batch >= self._next_epoch_at:
            self._next_epoch_at = None
            self._begin_epoch(self.model)

    def on_train_batch_end(self, batch, logs=None):
        if self._moving:
            self._step(self.model)

    def on_train_end(self, logs=None):
        self._training = False
        for algorithm in self._moving:
            algorithm.finish(self.model)
        self._moving = []
        _forget_inference(self.model)
        self._run_eagerly(self.model, self._eager_by_user)

    def on_test_begin(self, logs=None):
        # Validation data must not take part in ranges.
        self._paused = [(q, q.observer) for q in quantizers_of(self.model) if q.observer]
        for quantizer, _ in self._paused:
            quantizer.observer = None

    def on_test_end(self, logs=None):
        if self._training:
            for quantizer, observer in self._paused:
                quantizer.observer = observer
        elif self._paused:  # no training is going on that could go on observing
            self.model.run_eagerly = self._eager_by_user
            _forget_inference(self.model)

    on_predict_begin = on_test_begin
    on_predict_end = on_test_end

    def _step(self, model):
        step, length = self._done(model), self._epoch_length()
        epoch = step / length if length else None
        self._moving = [a for a in self._moving if a.update(model, step, epoch)]
        observing = any(quantizer.observer is not None for quantizer in quantizers_of(model))
        self._run_eagerly(model, self._eager_by_user or observing)

    def _done(self, model):
        return int(keras.ops.convert_to_numpy(model.optimizer.iterations))

    def _epoch_length(self):
        """Return the number of steps in an epoch, None until it is known."""
        return (self.params or {}).get("steps") or self._steps

    def _begin_epoch(self, model):
        """Tell every algorithm of a new epoch, counted by the optimizer's steps where possible."""
        length = self._epoch_length()
        epoch = self._done(model) // length if length else self._epoch
        if model.progress.get("epoch") == epoch:
            return
        for algorithm in _algorithms(model):
            if algorithm.built:
                algorithm.begin_epoch(model, epoch)
        model.progress["epoch"] = epoch
        if self.shrink and all(a.masks_are_final(model) for a in _algorithms(model)):
            shrink_in_place(model)

    def _run_eagerly(self, model, eager):
        """Switch between the eager and the compiled training step; a switch retraces it."""
        if model.run_eagerly != eager:
            _forget_inference(model)
            model.run_eagerly = eager
            model.make_train_function(force=True)


def _forget_inference(model):
    """Drop compiled inference: it was traced before ranges were known, and would not round."""
    model.test_function = None
    model.predict_function = None


class ExportIR(keras.callbacks.Callback):
    """Exports the best epoch's model to OpenVINO IR.

    Args:
        path: where the `.xml` goes; the `.bin` and the verification report go beside it.
        monitor: name of the logged quantity that decides, e.g. `"val_accuracy"`.
        mode: `"max"`, `"min"` or `"auto"` (`min` for losses and errors, `max` otherwise).
        verify: whether the last exported IR is compared with the trained model at the end.

    Raises:
        ValueError: unknown mode, or the monitored quantity is not logged.
    """

    def __init__(self, path, monitor="val_loss", mode="auto", verify=True):
        super().__init__()
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"Expected mode 'auto', 'min' or 'max'. Received: mode={mode!r}")
        self.path = pathlib.Path(path)
        self.monitor = monitor
        self.mode = mode
        self.verify = verify
        self.best = None

    def on_epoch_end(self, epoch, logs=None):
        from keras_compress.export import export

        logs = logs or {}
        if self.monitor not in logs:
            raise ValueError(
                f"ExportIR monitors '{self.monitor}', which is not logged. "
                f"Expected one of {sorted(logs)}. Received: monitor={self.monitor!r}"
            )
        value = float(logs[self.monitor])
        if math.isfinite(value) and (self.best is None or self._is_better(value)):
            self.best = value
            export(self.model, self.path, verify=self.verify)

    def _is_better(self, value):
        lower = self.monitor.endswith(("loss", "error"))
        down = lower if self.mode == "auto" else self.mode == "min"
        return value < self.best if down else value > self.best


class Statistics(keras.callbacks.Callback):
    """Adds compression figures to the epoch's logs, so that `History` and TensorBoard show them.

    Place it before `TensorBoard` and `CSVLogger` in the list of callbacks. Keys start with
    `compression/`.
    """

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        for algorithm in _algorithms(self.model):
            if algorithm.built:
                for key, value in algorithm.statistics(self.model).items():
                    logs[f"compression/{key}"] = float(value)
