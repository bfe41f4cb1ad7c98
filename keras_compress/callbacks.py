"""Callbacks that move compression along with `model.fit`."""

import math
import pathlib

import keras

from keras_compress.metrics import check_mode, lower_is_better
from keras_compress.model_facts import quantizers_of
from keras_compress.replicas import has_several_replicas
from keras_compress.shrink import shrink_in_place
from keras_compress.statistics import figures, histograms
from keras_compress.stepping import Stepper, algorithms_of
from keras_compress.training.backup import Backup
from keras_compress.training.compiled import EpochLength, batches_done, batches_per_update

__all__ = ["Backup", "Compress", "ExportIR", "Statistics"]


class Compress(keras.callbacks.Callback):
    """Moves every algorithm of a compressed model along with the optimizer's step.

    It reads its configuration from the model. The clock is `optimizer.iterations`, which survives
    saving and resuming. Epochs are counted by the batches that the optimizer has taken up, where
    the number of batches in one is known: that is the same clock, but for
    `gradient_accumulation_steps`, with which an update takes several batches.

    While an algorithm still reads the first training batches (activation ranges of a model that
    was compressed without `data`), training runs eagerly; the compiled step takes over afterwards.

    Args:
        shrink: whether channels are removed during training, as soon as the pruning masks are
            final: the epochs that follow train the smaller model, and are faster. Callbacks that
            keep weights of the larger model, such as `EarlyStopping(restore_best_weights=True)`,
            must not outlive that moment.

    Raises:
        ValueError: if the model is not a compressed one; on TensorFlow, if its optimizer averages
            weights (`use_ema`) and filters are scored by `taylor`; with `shrink`, if several
            replicas of `tf.distribute` train it.
    """

    def __init__(self, shrink=False):
        super().__init__()
        self.shrink = shrink

    def set_model(self, model):
        super().set_model(model)
        self._stepper = Stepper(model)
        _require_averages(model)
        if self.shrink:
            _require_one_replica(model)
        self._paused = []
        self._training = False
        self._epoch = 0
        self._next_epoch_at = math.inf  # batch of this epoch of `fit`
        self._length = None  # batches in an epoch, once that is known
        # Before `fit` makes its training step: what observes must be in it from the first batch.
        self._update(model)

    def on_train_begin(self, logs=None):
        self._training = True

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._measured = EpochLength(self.model.optimizer)
        self._next_epoch_at = self._begin_epoch(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if self._length is None:
            self._length = self._measured.batches(self.model.optimizer)

    def on_train_batch_begin(self, batch, logs=None):
        self._measured.group_begins(batch)
        # Elsewhere no batch has to read the clock, which stalls the device. The batch behind the
        # last, which Keras may begin without having one, is not one: on JAX, changes get lost then.
        if self._next_epoch_at <= batch < self._epoch_length():
            self._next_epoch_at = batch + self._begin_epoch(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self._measured.group_ends()
        if self._stepper.moving:
            self._update(self.model)

    def on_train_end(self, logs=None):
        self._training = False
        self._stepper.finish(self.model)

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
            self.model.run_eagerly = self._stepper.eager_by_user
            self.model.forget_inference()

    on_predict_begin = on_test_begin
    on_predict_end = on_test_end

    def _update(self, model):
        length, each = self._epoch_length(), batches_per_update(model.optimizer)
        step = batches_done(model.optimizer) // each
        self._stepper.update(model, step, length and length / each)

    def _epoch_length(self):
        """Return the number of batches in an epoch, None until it is known."""
        return (self.params or {}).get("steps") or self._length

    def _begin_epoch(self, model):
        """Tell every algorithm of a new epoch, counted by the optimizer's clock where possible.

        Returns:
            In how many batches the next one begins. Behind the end of this epoch of `fit`, unless
            training was resumed in the midst of one, or loss scaling has thrown batches away.
        """
        length, done = self._epoch_length(), batches_done(model.optimizer)
        epoch = done // length if length else self._epoch
        begun = self._stepper.begin_epoch(model, epoch)
        if begun and self.shrink and all(a.masks_are_final(model) for a in algorithms_of(model)):
            shrink_in_place(model)
        return length - done % length if length else math.inf


def _require_averages(model):
    """Raise where Keras would fail at the end of `fit`: it has no average of overwritten scores."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    overwritten = any(getattr(v, "overwrite_with_gradient", False) for v in model.variables)
    if keras.backend.backend() == "tensorflow" and overwritten and optimizer.use_ema:
        raise ValueError(
            f"Expected an optimizer without `use_ema` for model '{model.name}', whose filters are "
            "scored by `taylor`: Keras on TensorFlow cannot put averages in the place of weights "
            "then. Received: use_ema=True. Choose another `filter_importance`, such as 'L2'."
        )


def _require_one_replica(model):
    """Raise where a training step of several replicas would have to change while `fit` runs."""
    if has_several_replicas(model):
        raise ValueError(
            "Expected `shrink=False` under `tf.distribute` with several replicas, whose training "
            "step cannot be replaced while `fit` runs. Received: shrink=True for model "
            f"'{model.name}'. Between two calls of `fit`, write `small, optimizer = "
            "keras_compress.shrink(model, optimizer=model.optimizer)` and compile `small`."
        )


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
        check_mode(mode)
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
        down = lower_is_better(self.monitor, self.mode)
        return value < self.best if down else value > self.best


class Statistics(keras.callbacks.Callback):
    """Adds compression figures to the epoch's logs, so that `History` and TensorBoard show them.

    Place it before `TensorBoard` and `CSVLogger` in the list of callbacks. Keys start with
    `compression/`; every epoch has the same ones. Beside the figures that each algorithm gives:

    | key | what it is |
    |---|---|
    | `level/<algorithm>` | what its schedule asks for now |
    | `loss/<algorithm>` | what it adds to the loss, where that depends on the model alone |
    | `mean_weight_bits` | mean width of the weights that quantization takes, 32 where in float |
    | `range/<quantizer>` | `per_layer`: highest less lowest grid value, mean over channels |
    | `pruning_level/<group>` | `per_layer`: fraction of the channels of a group that is off |

    A quantizer is named `<layer>/<weight>`, or as its layer where it is on an edge; its range is
    NaN until that is known. A group is named as in the plan.

    With `log_dir` and `histogram_freq` it writes histograms for TensorBoard, as the run
    `compression` beside the runs `train` and `validation` of Keras' own `TensorBoard`:

    | tag | values |
    |---|---|
    | `raw_weight/<layer>/<weight>` | a weight as it is trained |
    | `effective_weight/<layer>/<weight>` | the same as its layer uses it, masked and rounded |
    | `mask_density/<layer>/<weight>` | fraction that is on, for each index of the last axis |
    | `range/<quantizer>` | highest less lowest grid value of every channel |

    Args:
        log_dir: folder for histograms, the same as that of `TensorBoard`.
        histogram_freq: every how many epochs they are written; 0 for never.
        per_layer: whether the figures of every quantizer and every group are in the logs.

    Raises:
        ValueError: no whole number, or only one of `log_dir` and `histogram_freq`; the model is not
            a compressed one.
    """

    def __init__(self, log_dir=None, histogram_freq=0, per_layer=False):
        super().__init__()
        whole = isinstance(histogram_freq, int) and not isinstance(histogram_freq, bool)
        if not whole or histogram_freq < 0:
            raise ValueError(
                "Expected a whole number of epochs, 0 for no histograms. "
                f"Received: histogram_freq={histogram_freq!r}"
            )
        if (log_dir is None) != (histogram_freq == 0):
            raise ValueError(
                "Expected both `log_dir` and `histogram_freq`, or neither: histograms are all that "
                "is written, figures are added to the logs. "
                f"Received: log_dir={log_dir!r}, histogram_freq={histogram_freq}"
            )
        self.log_dir = log_dir
        self.histogram_freq = histogram_freq
        self.per_layer = per_layer
        self._writer = None

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        if logs is not None:
            for key, value in figures(model, self.per_layer).items():
                logs[f"compression/{key}"] = float(value)
        if self.histogram_freq and epoch % self.histogram_freq == 0:
            self._write_histograms(model, epoch)

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_histograms(self, model, epoch):
        import tensorflow as tf  # which writes them on every backend

        if self._writer is None:
            folder = pathlib.Path(self.log_dir) / "compression"
            self._writer = tf.summary.create_file_writer(str(folder))
        with self._writer.as_default(step=epoch):
            for tag, values in histograms(model):
                tf.summary.histogram(tag, values)
        self._writer.flush()
