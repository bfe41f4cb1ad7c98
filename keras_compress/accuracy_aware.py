"""Accuracy-aware training, without the training: its options, its goal, and its decisions."""

import dataclasses
import math
from typing import Literal

import pydantic

from keras_compress.options import ConfigError, Options, Problem, integer, number, option

_BUDGETS = ("maximal_relative_accuracy_degradation", "maximal_absolute_accuracy_degradation")
_COMMON = {*_BUDGETS, "maximal_total_epochs"}
HIGHEST_RATE = 0.95
ROUNDING = 1e-6  # metrics and rates that differ by less are equal

_REQUIRED = {
    "early_exit": ("maximal_total_epochs",),
    "adaptive_compression_level": ("initial_training_phase_epochs", "patience_epochs"),
}


class AccuracyAwareParams(Options):
    """The budget, and how long and in which steps to look for the best rate within it."""

    maximal_relative_accuracy_degradation: number() | None = option(
        None, "Budget in percent of the original accuracy."
    )
    maximal_absolute_accuracy_degradation: number() | None = option(
        None, "Budget in points of the metric."
    )
    maximal_total_epochs: integer(1) = option(10000, "Epochs in all.")
    initial_training_phase_epochs: integer(0) = option(
        5, "Epochs that follow the user's own schedule first."
    )
    patience_epochs: integer(0) = option(3, "Epochs without gain before the rate is changed.")
    initial_compression_rate_step: number(0) = option(0.1, "First change of the rate.")
    compression_rate_step_reduction_factor: number(0, 1) = option(
        0.5, "Factor on the change when its direction flips."
    )
    lr_reduction_factor: number(0, 1) = option(0.5, "Factor on the learning rate at that moment.")
    minimal_compression_rate_step: number(0) = option(0.025, "Change below which to stop.")

    @pydantic.model_validator(mode="after")
    def _check_one_budget(self):
        written = [name for name in _BUDGETS if name in self.model_fields_set]
        if len(written) != 1:
            raise ValueError(
                f"expected exactly one of {' and '.join(_BUDGETS)}. Received: {written}"
            )
        return self


class AccuracyAwareTraining(Options):
    """Training within an accuracy budget."""

    mode: Literal["early_exit", "adaptive_compression_level"] = option(
        ..., "early_exit: stop within the budget; adaptive_compression_level: move the rate."
    )
    params: AccuracyAwareParams = option(..., "Budget and course.")

    @pydantic.model_validator(mode="after")
    def _check_mode(self):
        written = self.params.model_fields_set
        problems = [
            Problem(("params", name), f"this key is required with mode={self.mode!r}.")
            for name in _REQUIRED[self.mode]
            if name not in written
        ]
        if self.mode == "early_exit":
            problems += [
                Problem(("params", name), "expected only with mode='adaptive_compression_level'.")
                for name in sorted(written - _COMMON)
            ]
        if problems:
            raise ConfigError(problems)
        return self


@dataclasses.dataclass(frozen=True)
class Goal:
    """The value of a metric that must be kept.

    With a larger value being better, and b the value of the original:

        bound = b - maximal_absolute_accuracy_degradation
        bound = b - |b| * maximal_relative_accuracy_degradation / 100

    Where a smaller one is better, the degradation is added. A value within one millionth of the
    bound is within it: metrics are computed in float32.

    Attributes:
        baseline: value of the original model.
        bound: the worst value that is allowed.
        lower_is_better: whether small values are good ones.

    Example:

    >>> params = AccuracyAwareParams(maximal_relative_accuracy_degradation=1)
    >>> goal = Goal.of(params, 0.9, lower_is_better=False)
    >>> round(goal.bound, 4), goal.within(0.895), round(goal.margin(0.881), 4)
    (0.891, True, -0.01)
    """

    baseline: float
    bound: float
    lower_is_better: bool

    @classmethod
    def of(cls, params, baseline, lower_is_better):
        """Return the goal that a budget sets, from the value of the original model."""
        allowed = params.maximal_absolute_accuracy_degradation
        if allowed is None:
            allowed = abs(baseline) * params.maximal_relative_accuracy_degradation / 100
        bound = baseline + allowed if lower_is_better else baseline - allowed
        return cls(baseline, bound, lower_is_better)

    def margin(self, value):
        """Return by how much a value is better than the bound: what is left of the budget."""
        return self.bound - value if self.lower_is_better else value - self.bound

    def within(self, value):
        """Say whether a value keeps the bound; NaN does not."""
        return self.margin(value) >= -ROUNDING * max(1.0, abs(self.bound))

    def better(self, value, other):
        """Say whether a value is better than another; anything is better than None and NaN."""
        if math.isnan(value):
            return False
        if other is None or math.isnan(other):
            return True
        return value < other if self.lower_is_better else value > other

    def best(self, epochs):
        """Return the epoch whose state is the best one, of some that have been trained.

        It is that of the highest rate within the bound; where there is none, that of the lowest
        rate; then that of the best value; then the first. Epochs that are not `complete` count only
        where there is no other: then it is the last.

        Args:
            epochs: `EpochResult`s, at least one.
        """
        complete = [each for each in epochs if each.complete]
        if not complete:
            return epochs[-1]

        def key(each):
            rate = each.rate or 0.0
            margin = -math.inf if math.isnan(each.value) else self.margin(each.value)
            return (each.within, rate if each.within else -rate, margin, -each.epoch)

        return max(complete, key=key)


@dataclasses.dataclass(frozen=True)
class EpochResult:
    """One epoch of accuracy-aware training.

    Attributes:
        epoch: counted from 0.
        rate: that of the algorithm whose rate can move; None where it is not exactly one.
        value: of the metric.
        loss: of training.
        learning_rate: at the end of the epoch.
        within: whether the model was complete and the value within the bound.
        complete: whether it was what inference will be: every quantizer rounds, masks that are
            learnt have come to the rate that is asked for; with `early_exit`, all schedules are
            at their end. Other epochs are never chosen.
    """

    epoch: int
    rate: float | None
    value: float
    loss: float
    learning_rate: float
    within: bool
    complete: bool = True


@dataclasses.dataclass
class RateSearch:
    """The search for the highest rate within the bound: pure decisions, without training.

    After every epoch it is told the value (`observe`); when a change is `due` it gives the next
    rate (`move`). It raises the rate by `step` where the best value seen at the present rate is
    within the bound, and lowers it elsewhere. Where the direction flips, `step` and
    `learning_rate_factor` shrink. A lower rate that is known to be within the bound is not tried
    again: the direction flips there at once.

    Attributes:
        params: the `AccuracyAwareParams`.
        goal: the `Goal`.
        rate: the rate that is asked for; None before the search has begun.
        reached: the rate that came of it, which is higher where rates come in steps.
        step: the next change of the rate.
        learning_rate_factor: factor on the user's learning rate.
        raised: direction of the last change; None before the first.
        best: best value seen at the present rate, or None.
        waited: epochs since then.
        highest_within: highest rate that was within the bound, or None.
        ceiling: highest rate to try.
        stopped: why the search is over; empty while it goes on.
    """

    params: AccuracyAwareParams
    goal: Goal
    rate: float | None = None
    reached: float | None = None
    step: float | None = None
    learning_rate_factor: float = 1.0
    raised: bool | None = None
    best: float | None = None
    waited: int = 0
    highest_within: float | None = None
    ceiling: float = HIGHEST_RATE
    stopped: str = ""

    def begin(self, rate, best=None, highest_within=None):
        """Begin at a rate; with the best value that was seen at it, a change is due at once.

        Args:
            rate: that the model has.
            best: best value that was seen at it, or None.
            highest_within: highest rate that was within the bound so far, or None.
        """
        self.rate = self.reached = rate
        self.best, self.highest_within = best, highest_within
        self.step = self.params.initial_compression_rate_step
        self.waited = 0 if best is None else self.params.patience_epochs

    @property
    def begun(self):
        """Whether the search has begun."""
        return self.rate is not None

    @property
    def due(self):
        """Whether the rate is to be changed before the next epoch."""
        waited = self.best is not None and self.waited >= self.params.patience_epochs
        return self.begun and waited and not self.stopped

    def observe(self, value):
        """Take notice of the value after an epoch at the present rate."""
        if self.goal.better(value, self.best):
            self.best, self.waited = value, 0
        else:
            self.best = value if self.best is None else self.best
            self.waited += 1

    def move(self):
        """Return the next rate to train at, or None where the search is over."""
        raising = self.goal.within(self.best)
        if raising:
            self.highest_within = max(self.reached, self.highest_within or 0.0)
        if self.raised not in (None, raising):
            self._flip()
        wanted = self.reached + self.step if raising else self.rate - self.step
        known = self.highest_within
        if not raising and known is not None and wanted <= known + ROUNDING:
            self._flip()
            raising, wanted = True, known + self.step
        self.raised = raising
        return self._go(raising, wanted)

    def arrived(self, rate):
        """Take notice of the rate that came of the one that was asked for."""
        self.reached = max(rate, self.rate)

    def unreachable(self, rate, before):
        """Return a rate to try instead of one that the model cannot have; None: it is over.

        Args:
            rate: that cannot be reached.
            before: the rate that the model has.
        """
        self.ceiling = min(self.ceiling, rate)
        factor = self.params.compression_rate_step_reduction_factor
        while self.step >= self._least and before + self.step >= rate - ROUNDING and factor < 1:
            self.step *= factor
        if before + self.step >= rate - ROUNDING or rate <= before:
            return self._stop("no higher rate can be reached")
        self.rate = before
        return self._go(True, before + self.step)

    def _flip(self):
        self.step *= self.params.compression_rate_step_reduction_factor
        self.learning_rate_factor *= self.params.lr_reduction_factor

    def _go(self, raising, wanted):
        if self.step < self._least:
            return self._stop(f"the step fell below {self._least:g}")
        wanted = round(min(max(wanted, 0.0), self.ceiling), 9)
        if raising and wanted <= self.rate and wanted <= (self.highest_within or 0.0):
            return self._stop("no higher rate is to be tried")
        if not raising and wanted >= self.rate:
            return self._stop("there is no lower rate")
        self.rate = self.reached = wanted
        self.best, self.waited = None, 0
        return wanted

    def _stop(self, why):
        self.stopped = why

    @property
    def _least(self):
        return self.params.minimal_compression_rate_step

    def to_dict(self):
        """Return what changes in the course of the search, as JSON-able data."""
        fixed = ("params", "goal")
        fields = (field.name for field in dataclasses.fields(self) if field.name not in fixed)
        return {name: getattr(self, name) for name in fields}
