"""The option objects that the sparsity algorithms share."""

from typing import Literal

import pydantic

from keras_compress.options import Flag, Options, integer, number, option
from keras_compress.sparsity_schedules import SPARSITY_SCHEDULES

Sparsity = number(0, below=1)


class SparsityParams(Options):
    """Course of the sparsity level: its fraction of zeros over the epochs."""

    sparsity_level_setting_mode: Literal["global", "local"] = option(
        "global", "global: one threshold for all layers; local: a level in every layer."
    )
    sparsity_target: Sparsity = option(0.5, "Final sparsity.")
    sparsity_target_epoch: number(0) = option(90, "Epoch that reaches the target.")
    sparsity_freeze_epoch: number(0) = option(100, "Epoch from which masks stay as they are.")
    update_per_optimizer_step: Flag = option(
        False, "Moves the level with every step; polynomial schedule only."
    )
    steps_per_epoch: integer(1) | None = option(
        None, "Steps in an epoch, for update_per_optimizer_step in the first epoch."
    )
    multistep_steps: tuple[number(0), ...] = option((90,), "Epochs that change the level.")
    multistep_sparsity_levels: tuple[Sparsity, ...] = option(
        (0.1, 0.5), "Level before the first change and after each; the last is the target."
    )
    patience: integer(0) = option(1, "Epochs to wait; adaptive schedule only.")
    power: number(0) = option(0.9, "Exponent; polynomial schedule only.")
    concave: Flag = option(
        True, "true: 1 - (1 - p)^power; false: p^power; polynomial schedule only."
    )

    def schedule_from(self, init: float):
        """Returns the course of the level: a `SparsitySchedule` that starts at `init`."""
        make = SPARSITY_SCHEDULES[self.schedule]
        freeze = {"freeze_epoch": self.sparsity_freeze_epoch}
        if self.schedule == "multistep":
            levels = self.multistep_sparsity_levels
            return make(steps=self.multistep_steps, levels=levels, **freeze)
        if self.schedule == "adaptive":
            return make(init=init, target=self.final_sparsity, patience=self.patience, **freeze)
        shape = {"power": self.power, "concave": self.concave}
        return make(
            init=init,
            target=self.final_sparsity,
            target_epoch=self.sparsity_target_epoch,
            **(shape if self.schedule == "polynomial" else {}),
            **freeze,
        )

    @property
    def final_sparsity(self) -> float:
        """The level in the end."""
        multistep = self.schedule == "multistep"
        return self.multistep_sparsity_levels[-1] if multistep else self.sparsity_target

    @pydantic.model_validator(mode="after")
    def _check_per_step(self):
        if self.update_per_optimizer_step and self.schedule != "polynomial":
            raise ValueError(
                "expected schedule='polynomial' with update_per_optimizer_step. Received: "
                f"schedule={self.schedule!r}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_levels(self):
        steps, levels = self.multistep_steps, self.multistep_sparsity_levels
        if len(levels) != len(steps) + 1:
            raise ValueError(
                "expected one more entry in multistep_sparsity_levels than in multistep_steps. "
                f"Received: multistep_steps={list(steps)}, "
                f"multistep_sparsity_levels={list(levels)}"
            )
        return self
