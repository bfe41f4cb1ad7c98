"""The option objects that the sparsity algorithms share."""

from typing import Literal

import pydantic

from keras_compress.options import Flag, Options, integer, number, option

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
    concave: Flag = option(True, "Fast first, then slow; polynomial schedule only.")

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
