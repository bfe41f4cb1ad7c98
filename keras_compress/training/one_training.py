"""Several calls of `fit` that callbacks see as one, and the original model judged as `fit` does."""

import math

import keras
import numpy as np

from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.training.compiled import EpochLength


class _Record(keras.callbacks.Callback):
    """Keeps the logs of the last epoch, with what the callbacks before it added."""

    def __init__(self):
        super().__init__()
        self.logs = {}

    def on_epoch_end(self, epoch, logs=None):
        self.logs = dict(logs or {})


class OneTraining(keras.callbacks.CallbackList):
    """Callbacks that see calls of `fit` of one epoch each as one training.

    Training begins for them with `begin` and ends with `end`; what `fit` says about that does not
    reach them. A `History` is added where there is none.

    Args:
        callbacks: list of callbacks.
        model: the compiled model.
        epochs: how many there will be at most.
        steps: batches in an epoch; None where that is not known: it is measured in the first.
        learning_rate: the `LearningRate`; callbacks see that of the user when an epoch begins.
        seed: the random generators are set to it plus the epoch when one begins. None: they are
            left alone.

    Attributes:
        steps: batches in an epoch, once that is known.
    """

    def __init__(self, callbacks, model, epochs, steps, learning_rate, seed=None):
        self._record = _Record()
        self._seed = seed
        self._learning_rate = learning_rate
        self.steps = steps
        history = [c for c in callbacks if isinstance(c, keras.callbacks.History)]
        added = [] if history else [keras.callbacks.History()]
        super().__init__(
            [*callbacks, *added, self._record],
            add_history=True,
            model=model,
            epochs=epochs,
            steps=steps,
            verbose=0,
        )

    @property
    def logs(self):
        """Logs of the last epoch, after all callbacks."""
        return self._record.logs

    def begin(self):
        """Tell the callbacks that training begins."""
        super().on_train_begin()

    def end(self):
        """Tell the callbacks that training ends."""
        super().on_train_end(self.logs)

    def on_train_begin(self, logs=None):
        pass

    def on_train_end(self, logs=None):
        pass

    def on_epoch_begin(self, epoch, logs=None):
        self._length = EpochLength(self.model.optimizer)
        with self._learning_rate.without_factor():
            super().on_epoch_begin(epoch, logs)
        # Data are shuffled from here on. The first `fit` of a process has looked at a batch before.
        self.set_seed(epoch)

    def set_seed(self, epoch):
        """Set the random generators for an epoch; on TensorFlow, data sets are made with it."""
        if self._seed is not None:
            keras.utils.set_random_seed(self._seed + epoch)

    def on_train_batch_begin(self, batch, logs=None):
        self._length.group_begins(batch)
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._length.group_ends()
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.steps is None:
            self.steps = self._length.batches(self.model.optimizer)
            self.set_params(self.params | {"steps": self.steps})


def steps_in_epoch(x, batch_size=None, steps_per_epoch=None):
    """Return how many batches `fit` makes of data in an epoch, or None where it cannot know.

    Args:
        x: what `fit` takes as `x`.
        batch_size: the same argument of `fit`.
        steps_per_epoch: the same.
    """
    if steps_per_epoch is not None:
        return steps_per_epoch
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    leaves = keras.tree.flatten(x)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        return math.ceil(len(leaves[0]) / (batch_size or 32))
    try:
        return len(x)
    except TypeError:  # generators, and datasets of unknown or endless length
        return None


def judged(original, model, validation_data, **arguments):
    """Return {name: value} of a plain model on validation data, by a compressed model's metrics.

    Args:
        original: a Keras model. A copy of it is compiled and judged.
        model: the compiled `CompressedModel`, of whose loss and metrics fresh ones are made.
        validation_data: as `fit` takes it.
        **arguments: further ones of `evaluate`.
    """
    given = model.compiled_with
    kept = ("loss", "loss_weights", "metrics", "weighted_metrics", "run_eagerly", "jit_compile")
    settings = {name: given[name] for name in kept if name in given}
    for name in ("metrics", "weighted_metrics"):
        settings[name] = keras.tree.map_structure(_fresh, settings.get(name))
    copy = rebuild(trace(original))
    copy.compile(**settings)
    x, y, weights = keras.utils.unpack_x_y_sample_weight(validation_data)
    found = copy.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True, **arguments)
    return {name: float(np.asarray(value)) for name, value in found.items()}


def _fresh(metric):
    """Return a metric of the same configuration that has seen nothing."""
    if isinstance(metric, keras.metrics.Metric):
        return type(metric).from_config(metric.get_config())
    return metric
