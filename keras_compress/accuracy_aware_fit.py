"""Training within an accuracy budget: `accuracy_aware_fit`."""

import contextlib
import dataclasses
import logging
import math
import numbers
import tempfile

import keras
from rich.console import Console
from rich.live import Live

from keras_compress.accuracy_aware import ROUNDING, EpochResult, Goal, RateSearch
from keras_compress.algorithms import Quantization, RBSparsity
from keras_compress.algorithms.rb_sparsity import FAR
from keras_compress.algorithms.weight_sparsity import ScheduledSparsity
from keras_compress.callbacks import Compress
from keras_compress.compressed_model import CompressedModel
from keras_compress.layers import PACKAGE
from keras_compress.metrics import check_mode, lower_is_better
from keras_compress.options import ConfigError
from keras_compress.training.accuracy_result import AccuracyAwareResult, epoch_table
from keras_compress.training.checkpoints import WEIGHTS, Checkpoints, fingerprint
from keras_compress.training.compiled import built_optimizer
from keras_compress.training.learning_rate import LearningRate
from keras_compress.training.one_training import OneTraining, judged, steps_in_epoch

logger = logging.getLogger(PACKAGE)

ADAPTIVE = "adaptive_compression_level"
SHOWN = 12  # last epochs in the live table
OWN = ("epochs", "initial_epoch", "validation_split", "validation_freq")


def accuracy_aware_fit(
    model,
    x=None,
    y=None,
    *,
    validation_data=None,
    baseline=None,
    metric="val_accuracy",
    mode="auto",
    callbacks=None,
    folder=None,
    seed=0,
    verbose=True,
    **fit_arguments,
):
    """Train a compressed model within the accuracy budget of `accuracy_aware_training`.

    With `early_exit` it ends with the first epoch within the budget after the schedules' end. With
    `adaptive_compression_level` the rate is raised while accuracy is within it, else lowered, in
    steps that shrink; the best state is loaded before each change. To callbacks it is one training.

    Args:
        model: compiled, made by `compress_model`. It holds the best state afterwards.
        x: what `fit` takes.
        y: what `fit` takes.
        validation_data: what `fit` takes; the model is judged on it after every epoch.
        baseline: value of the metric for the original model, or that model, which is judged.
        metric: name of the logged quantity that counts.
        mode: `"max"`, `"min"`, or `"auto"`: by the name, `min` for losses and errors.
        callbacks: list of callbacks; `Compress` is added where it is missing.
        folder: where the state is written after every epoch: the same call goes on where one that
            was ended left off. None: a temporary folder.
        seed: the random generators are set to it plus the epoch, so that a training that was
            resumed ends in the same weights as one that was not. None: they are left alone.
        verbose: whether a live table is shown.
        **fit_arguments: further ones of `fit`, such as `batch_size`.

    Returns:
        An `AccuracyAwareResult`.

    Raises:
        TypeError: not a compressed model.
        ValueError: it is not compiled, its configuration lacks the key, an argument is missing or
            wrong, the folder holds another training, the metric is not logged.
        ConfigError: widths shall move that were not searched for.
    """
    _check_model(model)
    callbacks = _checked_callbacks(callbacks)
    _check_arguments(validation_data, baseline, metric, mode, seed, fit_arguments)
    given = {"x": x, "y": y, "validation_data": validation_data} | fit_arguments
    options = _Options(metric, lower_is_better(metric, mode), seed, callbacks, given)
    return _run(model, options, baseline, folder, verbose)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `accuracy_aware_fit` was given."""

    metric: str
    lower_is_better: bool
    seed: int | None
    callbacks: list
    fit_arguments: dict


def _run(model, options, baseline, folder, verbose):
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        loop = _Loop(model, options, baseline, folder)
        return loop.run(stack.enter_context(_Display(loop, verbose)))


class _Loop:
    """The training: what is decided elsewhere, done to the model."""

    def __init__(self, model, options, baseline, folder):
        self.model, self.options = model, options
        training = model.config.accuracy_aware_training
        self.params = training.params
        self.adaptive = training.mode == ADAPTIVE
        self.algorithm = _algorithm_with_rate(model)
        if self.adaptive:
            self.algorithm.rate(model)  # raises where widths cannot move
        self.learning_rate = LearningRate(built_optimizer(model))
        self.checkpoints = Checkpoints(folder, self._identity(baseline))
        record = self.checkpoints.record or {}
        value = record.get("baseline")
        value = self._judged(baseline) if value is None else value
        self.goal = Goal.of(self.params, value, options.lower_is_better)
        self.search = RateSearch(self.params, self.goal, **record.get("search", {}))
        self.epochs = [EpochResult(**each) for each in record.get("epochs", ())]
        self.history = record.get("history", {})
        self.factors = record.get("factors", {})  # state -> factor on the learning rate
        self.steps = record.get("steps")
        self.stopped = record.get("stopped", "")
        self.finished = record.get("finished", False)
        self.checkpoints.open()

    def _identity(self, baseline):
        """Return what must be the same where a training is taken up again."""
        config = self.model.config.to_dict()
        if isinstance(self.algorithm, Quantization):  # widths move
            for each in config["compression"]:
                each.get("initializer", {}).get("precision", {}).pop("bitwidth_per_scope", None)
        return {
            "configuration": config,
            "shapes": fingerprint(self.model),
            "metric": [self.options.metric, self.options.lower_is_better],
            "baseline": None if isinstance(baseline, keras.Model) else float(baseline),
            "seed": self.options.seed,
        }

    def _judged(self, baseline):
        """Return the value of the metric for the original model."""
        if isinstance(baseline, keras.Model):
            given = self.options.fit_arguments
            batch_size = given.get("validation_batch_size") or given.get("batch_size")
            steps = given.get("validation_steps")
            data = given["validation_data"]
            values = judged(baseline, self.model, data, batch_size=batch_size, steps=steps)
            baseline = self._value({f"val_{name}": value for name, value in values.items()})
        if not math.isfinite(baseline):
            raise ValueError(
                f"Expected a finite value of the original model. Received: baseline={baseline}"
            )
        return float(baseline)

    def _value(self, logs):
        metric = self.options.metric
        if metric not in logs:
            raise ValueError(
                f"Expected a metric that is logged, one of {sorted(logs)}. "
                f"Received: metric={metric!r}"
            )
        return float(logs[metric])

    def run(self, display):
        """Train until it is over; return the `AccuracyAwareResult`."""
        if self.epochs:
            last = self.epochs[-1] if not self.finished else self.best
            self._restore(last)
        elif self.adaptive and self.params.initial_training_phase_epochs == 0:
            self._begin_search()
        if self.finished:
            self._fix()
        else:
            self._train(display)
        best = self.best
        return AccuracyAwareResult(
            metric=self.options.metric,
            baseline=self.goal.baseline,
            bound=self.goal.bound,
            rate=best.rate,
            value=best.value,
            reached=best.within,
            epoch=best.epoch,
            stopped=self.stopped,
            epochs=tuple(self.epochs),
            history=self.history,
            lower_is_better=self.goal.lower_is_better,
        )

    @property
    def best(self):
        """The epoch whose state is the best one so far."""
        return self.goal.best(self.epochs)

    def _train(self, display):
        given = self.options.fit_arguments
        lengths = given["x"], given.get("batch_size"), given.get("steps_per_epoch")
        steps = steps_in_epoch(*lengths) if self.steps is None else self.steps
        total = self.params.maximal_total_epochs
        callbacks, seed = self.options.callbacks, self.options.seed
        callbacks = OneTraining(callbacks, self.model, total, steps, self.learning_rate, seed)
        callbacks.begin()
        while not self.stopped:
            if self.search.due:
                self._move()
                self.stopped = self.search.stopped
            if not self.stopped:
                self._epoch(callbacks)
                display.show()
        callbacks.end()
        self._finish()

    def _epoch(self, callbacks):
        """Train one epoch, take notice of it, and write the state down."""
        epoch = len(self.epochs)
        callbacks.set_seed(epoch)
        self.model.fit(
            **self.options.fit_arguments,
            callbacks=callbacks,
            initial_epoch=epoch,
            epochs=epoch + 1,
            verbose=0,
        )
        self.steps = callbacks.steps
        logs = callbacks.logs
        value, complete = self._value(logs), self._is_complete()
        within = complete and self.goal.within(value)
        rate = self.algorithm and float(self.algorithm.rate(self.model))
        loss, learning_rate = float(logs.get("loss", math.nan)), self.learning_rate.value
        self.epochs.append(EpochResult(epoch, rate, value, loss, learning_rate, within, complete))
        for name, logged in logs.items():
            self.history.setdefault(name, []).append(float(logged))
        self._decide(self.epochs[-1])
        if all(quantizer.observer is None for quantizer in self.model.quantizers()):
            self._write(WEIGHTS.format(epoch))

    def _decide(self, epoch):
        """Let the search know, and say whether training is over."""
        if self.adaptive and self.search.begun:
            if epoch.complete:
                self.search.observe(epoch.value)
        elif self.adaptive and len(self.epochs) >= self.params.initial_training_phase_epochs:
            self._begin_search()
        if not self.adaptive and epoch.within:
            self.stopped = "an epoch is within the bound"
        elif len(self.epochs) >= self.params.maximal_total_epochs:
            self.stopped = "all epochs are used up"
        elif self.model.stop_training:
            self.stopped = "a callback stopped it"

    def _begin_search(self):
        rate = float(self.algorithm.rate(self.model))
        seen, best = [e for e in self.epochs if e.complete], None
        for each in seen:
            if abs(each.rate - rate) <= ROUNDING and self.goal.better(each.value, best):
                best = each.value
        within = max((each.rate for each in seen if each.within), default=None)
        self.search.begin(rate, best, within)
        if best is None and self.algorithm.adjustable:
            self._set_rate(rate)  # to be held: no schedule moves it from now on

    def _move(self):
        """Change the rate of the best state there is, and the learning rate with it."""
        wanted = self.search.move()
        while wanted is not None:
            self._restore(self.best)
            try:
                self._set_rate(wanted)
                self.search.arrived(float(self.algorithm.rate(self.model)))
                break
            except ConfigError:
                before = float(self.algorithm.rate(self.model))
                wanted = self.search.unreachable(wanted, before)
        if self.learning_rate.scale(self.search.learning_rate_factor):
            self.model.forget_compiled()

    def _set_rate(self, rate):
        if isinstance(self.algorithm, RBSparsity):  # fixed masks could not follow
            for entry in self.algorithm.masked(self.model):
                entry.mask.frozen.assign(False)
        self.algorithm.set_rate(self.model, rate)

    def _is_complete(self):
        """Whether the model is what inference will be: see `EpochResult.complete`."""
        algorithms = self.model.config.algorithms
        quantizers = self.model.quantizers()
        return all(map(self._has_come, algorithms)) and all(
            q.is_on and q.calibrated and q.observer is None for q in quantizers
        )

    def _has_come(self, algorithm):
        """Whether an algorithm has done what it is asked for: all, or what the rate says."""
        model = self.model
        lags = isinstance(algorithm, RBSparsity)  # its masks have to learn what the rate is
        if lags and algorithm.sparsity(model) < algorithm.rate(model) - FAR:
            return False
        if self.adaptive and algorithm.name == self.algorithm.name:
            return True
        if algorithm.adjustable:
            return algorithm.rate(model) >= algorithm.final_rate - ROUNDING
        return algorithm.masks_are_final(model)

    def _write(self, name):
        """Write the state down: the last one, and the best one."""
        if name is not None:
            self.factors[name] = self.learning_rate.factor
        best = WEIGHTS.format(self.best.epoch)
        keep = [best] if best in self.checkpoints.facts and best != name else []
        self.factors = {each: self.factors[each] for each in (*keep, name) if each is not None}
        record = {
            "baseline": self.goal.baseline,
            "search": self.search.to_dict(),
            "epochs": [dataclasses.asdict(each) for each in self.epochs],
            "history": self.history,
            "factors": self.factors,
            "steps": self.steps,
            "stopped": self.stopped,
            "finished": self.finished,
        }
        self.checkpoints.write(self.model, name, keep, record)

    def _restore(self, epoch):
        """Give the model the state of an epoch."""
        name = WEIGHTS.format(epoch.epoch)
        changed = self.checkpoints.restore(self.model, name)
        if self.learning_rate.loaded(self.factors[name]) or changed:
            self.model.forget_compiled()

    def _finish(self):
        """Load the best state, fix its masks, and write down that training is over."""
        best = self.best
        if WEIGHTS.format(best.epoch) in self.checkpoints.facts:
            self._restore(best)
            self.finished = True
            self._write(None)
        self._fix()
        if not best.within:
            logger.warning(
                "accuracy_aware_fit: no epoch came within the bound: %s of %.6g at best for a "
                "bound of %.6g%s. Train longer, or allow a larger degradation.",
                self.options.metric,
                best.value,
                self.goal.bound,
                "" if best.rate is None else f", at rate {best.rate:.4g}, the lowest tried",
            )

    def _fix(self):
        """Make the masks of the state that was chosen final."""
        for algorithm in self.model.config.algorithms:
            reached = self.model.progress.get(algorithm.name, {})
            if not (algorithm.adjustable and self.best.complete):
                continue
            if isinstance(algorithm, ScheduledSparsity) and not reached.get("frozen"):
                algorithm.freeze(self.model)
            if isinstance(algorithm, ScheduledSparsity) or reached.get("held"):
                self.model.progress[algorithm.name] = dict(reached) | {"frozen": True}


class _Display:
    """A table of the last epochs that is drawn anew after each."""

    def __init__(self, loop, verbose):
        self.loop = loop
        console = Console(stderr=True)
        self.live = Live(console=console, auto_refresh=False, transient=True) if verbose else None

    def __enter__(self):
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception):
        if self.live is not None:
            self.live.stop()

    def show(self):
        """Draw what the loop has come to."""
        if self.live is not None:
            loop = self.loop
            step = loop.search.step
            table = epoch_table(
                loop.epochs[-SHOWN:], loop.goal, loop.options.metric, loop.best.epoch
            )
            table.caption = "" if step is None else f"next change of the rate: {step:.4g}"
            self.live.update(table, refresh=True)


def _algorithm_with_rate(model):
    """Return the one algorithm whose rate is known, or None."""
    known = [
        algorithm
        for algorithm in model.config.adjustable
        if algorithm.adjustable or model.plan.get("precision")
    ]
    if model.config.accuracy_aware_training.mode == ADAPTIVE:
        return model.config.adjustable[0]
    return known[0] if len(known) == 1 else None


def _check_model(model):
    if not isinstance(model, CompressedModel):
        raise TypeError(
            "Expected a model made by `keras_compress.compress_model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "Expected a compiled model: `model.compile(optimizer, loss, metrics=...)`. "
            f"Received: model '{model.name}', which is not compiled"
        )
    if model.config.accuracy_aware_training is None:
        raise ValueError(
            "Expected a model compressed with `accuracy_aware_training` in its configuration. "
            f"Received: model '{model.name}' with the keys {sorted(model.config.to_dict())}"
        )


def _checked_callbacks(callbacks):
    """Return the callbacks as a list with `Compress` among them."""
    callbacks = keras.tree.flatten([] if callbacks is None else callbacks)
    for callback in callbacks:
        if not isinstance(callback, keras.callbacks.Callback) or isinstance(
            callback, (keras.callbacks.CallbackList, keras.callbacks.BackupAndRestore)
        ):
            raise ValueError(
                "Expected a list of callbacks; training is resumed by `folder`, not by "
                f"`BackupAndRestore`. Received: {callback!r}"
            )
        if isinstance(callback, Compress) and callback.shrink:
            raise ValueError(
                "Expected `Compress()` without `shrink`: states of several levels are loaded "
                "again. Call `keras_compress.shrink` afterwards. Received: shrink=True"
            )
    has_compress = any(isinstance(callback, Compress) for callback in callbacks)
    return callbacks if has_compress else [Compress(), *callbacks]


def _check_arguments(validation_data, baseline, metric, mode, seed, fit_arguments):
    check_mode(mode)
    if validation_data is None:
        raise ValueError(
            "Expected data to judge the model on after every epoch. Received: validation_data=None"
        )
    is_number = isinstance(baseline, numbers.Real) and not isinstance(baseline, bool)
    if not is_number and not isinstance(baseline, keras.Model):
        raise ValueError(
            f"Expected the value of '{metric}' for the original model, or that model. "
            f"Received: baseline={baseline!r}"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"Expected a whole number of at least 0, or None. Received: seed={seed!r}")
    own = [name for name in OWN if name in fit_arguments]
    if own:
        raise ValueError(
            "Expected arguments of `fit` that leave epochs and validation to the configuration and "
            f"to `validation_data`. Received: {', '.join(own)}"
        )
