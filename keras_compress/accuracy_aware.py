"""Options of accuracy-aware training: compress as far as an accuracy budget allows."""

from typing import Literal

import pydantic

from keras_compress.options import ConfigError, Options, Problem, integer, number, option

_BUDGETS = ("maximal_relative_accuracy_degradation", "maximal_absolute_accuracy_degradation")
_COMMON = {*_BUDGETS, "maximal_total_epochs"}
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
