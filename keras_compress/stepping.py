"""What moves the algorithms of a model along: `Compress` in `fit`, `step` in any other loop."""

import numbers
import weakref

from keras_compress.algorithms.base import Algorithm
from keras_compress.algorithms.quantizer_options import StagedParams
from keras_compress.compressed_model import CompressedModel
from keras_compress.model_facts import quantizers_of

_LOOPS = weakref.WeakKeyDictionary()  # model -> its `_Loop`, outside of what Keras tracks and saves


def algorithms_of(model):
    """Return the algorithms of a compressed model.

    Raises:
        ValueError: it is not a compressed one.
    """
    algorithms = getattr(getattr(model, "config", None), "algorithms", None)
    if algorithms is None:
        raise ValueError(
            "Expected a model made by `keras_compress.compress_model`. Received: model "
            f"'{getattr(model, 'name', model)}' (of type {type(model).__name__})"
        )
    return list(algorithms)


class Stepper:
    """Moves the algorithms of one model along, during one training of it.

    It keeps no model, no layer and no variable: every method is given the model. (On JAX, what
    `fit` has done so far is in the model only when a callback asks for it.)

    Args:
        model: the compressed model.

    Attributes:
        moving: the algorithms whose `update` has not returned False yet; the others are not asked
            again.
        eager_by_user: whether the user compiled the model with `run_eagerly`.

    Raises:
        ValueError: the model is not a compressed one.
    """

    def __init__(self, model):
        self.moving = algorithms_of(model)
        self.eager_by_user = model.run_eagerly
        self._constants = _constants(quantizers_of(model))

    def update(self, model, step, steps_per_epoch):
        """Tell the algorithms that move how many steps have been made.

        Args:
            model: the model.
            step: optimizer's steps so far.
            steps_per_epoch: None where that is not known.

        Returns:
            Whether the next step must run eagerly: activation ranges are being read from it.
        """
        if not self.moving:
            return False
        epoch = step / steps_per_epoch if steps_per_epoch else None
        self.moving = [each for each in self.moving if each.update(model, step, epoch)]
        return self._settle(model)

    def begin_epoch(self, model, epoch):
        """Tell every algorithm of an epoch, counted from 0; once, also where training resumes.

        Returns:
            Whether the epoch was a new one.
        """
        begins = model.progress.get("epoch") != epoch
        for algorithm in algorithms_of(model) if begins else ():
            algorithm.begin_epoch(model, epoch)
        model.progress["epoch"] = epoch
        self._settle(model)  # also where a backup has brought ranges since training began
        return begins

    def finish(self, model):
        """Tell the algorithms that still move of the end of training."""
        for algorithm in self.moving:
            algorithm.finish(model)
        self.moving = []
        self._settle(model)

    def _settle(self, model):
        """Make compiled functions fit the quantizers; return whether any of those observes."""
        quantizers = quantizers_of(model)
        observing = any(quantizer.observer is not None for quantizer in quantizers)
        eager = self.eager_by_user or observing
        constants = _constants(quantizers)
        # Masks, levels and switches are variables, which compiled functions read at every call:
        # they stay as they are, unless one of the constants has changed.
        if constants != self._constants or model.run_eagerly != eager:
            self._constants = constants
            model.run_eagerly = eager
            model.forget_compiled()
        return observing


def _constants(quantizers):
    """Return what a compiled function holds of the quantizers as constants."""
    return [(each.calibrated, getattr(each, "signed", None)) for each in quantizers]


class _Loop:
    """A training that `step` is called from.

    Attributes:
        stepper: its `Stepper`.
        step: the number that `step` was called with last.
        steps_per_epoch: the same; that of the configuration where none was given.
    """

    def __init__(self, model):
        self.stepper = Stepper(model)
        self.step = 0
        self.steps_per_epoch = _configured_length(self.stepper.moving)
        self._needs_no_epochs = False

    def advance(self, model, step, steps_per_epoch):
        """Do what `step` does; nothing has changed where it raises."""
        length = steps_per_epoch or self.steps_per_epoch
        if length is None and not self._needs_no_epochs:
            _require_no_epochs(model)
            self._needs_no_epochs = True
        self.step, self.steps_per_epoch = step, length
        observing = self.stepper.update(model, step, length)
        if length:
            self.stepper.begin_epoch(model, step // length)
        return observing


def step(model, step, steps_per_epoch=None):
    """Move compression along in a training loop of your own, as `Compress` does in `fit`.

    Call it before every training step, and `finish` after the last one. Epochs, and with them
    masks and schedules, begin where `step` is a multiple of `steps_per_epoch`; the order is that of
    `fit`: first what the last step calls for, then the new epoch. Where nothing moves, a call does
    nothing but count.

    `compress_model` without `data` leaves the ranges of activations to the first training batches.
    The steps that they are read from must run eagerly, not compiled. For `model.train_on_batch`
    this is done here.

    Args:
        model: a model made by `compress_model`, `shrink` or loading its file.
        step: whole number, the optimizer's steps so far: 0 before the first, and where training
            resumes as many as were made before. It never goes back, until `finish`.
        steps_per_epoch: whole number of at least 1. None: that of the algorithms' own
            `steps_per_epoch`, if any. Where no algorithm follows epochs none is needed.

    Returns:
        Whether the next training step must run eagerly.

    Raises:
        ValueError: not a compressed model, not such a number, a step before the last one, or
            epochs of unknown length that an algorithm follows.

    Example:

    ```python
    for step, (x, y) in enumerate(batches):
        kc.step(model, step, steps_per_epoch=100)
        model.train_on_batch(x, y)
    kc.finish(model, step + 1)
    ```
    """
    step = _whole("step", step, 0)
    if steps_per_epoch is not None:
        steps_per_epoch = _whole("steps_per_epoch", steps_per_epoch, 1)
    loop = _running(model) or _Loop(model)
    _require_order(model, loop, step)
    observing = loop.advance(model, step, steps_per_epoch)
    _LOOPS[model] = loop
    return observing


def finish(model, step):
    """End a training loop of your own: what `fit` and `Compress` do after the last step.

    Ranges are set from the samples seen so far, where there were too few; masks that were due are
    fixed. A new loop may start with any step afterwards.

    Args:
        model: the model that `step` was called with.
        step: whole number, the optimizer's steps so far.

    Raises:
        ValueError: `step` has not been called with the model since it was made or since the last
            `finish`, or a step before the last one.
    """
    step = _whole("step", step, 0)
    algorithms_of(model)
    loop = _running(model)
    if loop is None:
        raise ValueError(
            "Expected a model in training: `keras_compress.step(model, step)` before every step, "
            f"then `keras_compress.finish`. Received: model '{model.name}', which `step` was not "
            "called with, or which is finished already"
        )
    _require_order(model, loop, step)
    loop.stepper.update(model, step, loop.steps_per_epoch)
    loop.stepper.finish(model)
    del _LOOPS[model]


def _running(model):
    """Return the `_Loop` of a model; None where there is none."""
    return _LOOPS.get(model) if isinstance(model, CompressedModel) else None


def _whole(name, value, smallest):
    """Return a whole number as an int; raise unless it is one and not below the smallest."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < smallest:
        raise ValueError(
            f"Expected a whole number of at least {smallest}, such as "
            f"`int(model.optimizer.iterations)`. Received: {name}={value!r}"
        )
    return int(value)


def _require_order(model, loop, step):
    if step < loop.step:
        raise ValueError(
            f"Expected a step that is not before {loop.step}, the last one of model "
            f"'{model.name}'. Received: step={step}. To begin another training, call "
            f"`keras_compress.finish(model, {loop.step})` first"
        )


def _configured_length(algorithms):
    """Return the steps in an epoch that the algorithms' own options say, None where none does."""
    params = (getattr(algorithm, "params", None) for algorithm in algorithms)
    lengths = {getattr(each, "steps_per_epoch", None) for each in params} - {None}
    return lengths.pop() if len(lengths) == 1 else None


def _require_no_epochs(model):
    """Raise where an algorithm waits for epochs, whose length is not known."""
    waiting = [each.name for each in algorithms_of(model) if _follows_epochs(each, model)]
    if waiting:
        raise ValueError(
            f"Expected `steps_per_epoch`, as {', '.join(waiting)} of model '{model.name}' "
            f"{'follows' if len(waiting) == 1 else 'follow'} epochs. Received: "
            "steps_per_epoch=None. Write `keras_compress.step(model, step, steps_per_epoch=...)`"
        )


def _follows_epochs(algorithm, model):
    """Whether something is still to happen at the beginning of an epoch."""
    kind = type(algorithm)
    if kind.begin_epoch is Algorithm.begin_epoch:
        return False
    if kind.masks_are_final is not Algorithm.masks_are_final:
        held = model.progress.get(algorithm.name, {}).get("held", False)
        return not held and not algorithm.masks_are_final(model)
    if isinstance(getattr(algorithm, "params", None), StagedParams):
        return any(not quantizer.is_on for quantizer in quantizers_of(model))
    return True
