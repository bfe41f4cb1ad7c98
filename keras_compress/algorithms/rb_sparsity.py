"""Regularization-based sparsity: masks that are learnt."""

import logging
import math
from typing import ClassVar, Literal

import keras

from keras_compress.algorithms.sparsity_options import Sparsity, SparsityParams
from keras_compress.algorithms.weight_sparsity import ScheduledSparsity
from keras_compress.compressed_layer import PACKAGE
from keras_compress.options import number, option
from keras_compress.weight_masks import RBMask

logger = logging.getLogger(PACKAGE)

FAR = 0.02  # sparsity this far from the level when masks are fixed is worth a warning
SLACK = 0.05  # a density this far from the one asked for costs a loss of 1


class RBSparsityParams(SparsityParams):
    """Course of the level that the loss asks for."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = option(
        "exponential", "Course of the level."
    )


class RBSparsity(ScheduledSparsity):
    """Sparsity by random masks whose probabilities are trained.

    The loss draws the density, the fraction of weights that inference keeps, to the one that the
    level of the epoch asks for. With N weights, of which the masks m keep those above 0:

        loss = ((sum 1[sigmoid(m) > 1/2] / N - (1 - level)) / 0.05)^2

    over all layers together; `local` takes the mean of every layer's own. From
    `sparsity_freeze_epoch` on masks are fixed, and the loss is 0.

    Example:

    >>> sparsity = RBSparsity(params={"sparsity_target": 0.8, "sparsity_target_epoch": 2})
    >>> [round(sparsity.schedule(epoch), 3) for epoch in range(3)]
    [0.0, 0.553, 0.8]
    """

    name: ClassVar[str] = "rb_sparsity"

    sparsity_init: Sparsity = option(0.0, "Sparsity to start with.")
    params: RBSparsityParams = option(RBSparsityParams(), "Course of the level.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of masks; the top-level key when not given."
    )

    def make_mask(self, config, node, weight):
        """Returns what makes an `RBMask`, and its description."""
        text = f"learnt mask, {self.params.final_sparsity:.1%} zeros wanted"
        return self.named(RBMask, lr_multiplier=self.gradient_factor(config)), text

    def set_level(self, model, level: float) -> None:
        """Asks for a level: the loss draws the masks there."""
        for entry in self.masked(model):
            entry.mask.level.assign(level)

    def freeze(self, model) -> None:
        """Fixes the masks as inference uses them; says so where they are far from the level."""
        reached, level = self.sparsity(model), model.progress[self.name]["level"]
        if abs(reached - level) > FAR:
            logger.warning(
                "rb_sparsity: masks are fixed at a sparsity of %.1f%%, although %.1f%% was asked "
                "for. Train longer before `sparsity_freeze_epoch`, or at a higher learning rate: "
                "the logits of the masks start at 4.6 and have to come below 0.",
                100 * reached,
                100 * level,
            )
        for entry in self.masked(model):
            entry.mask.fix()

    def loss(self, model, inputs, outputs):
        """Returns the loss that draws the density to the one asked for."""
        masks = [entry.mask for entry in self.masked(model)]
        counts = [mask.kept() for mask in masks]
        wanted = 1.0 - keras.ops.convert_to_tensor(masks[0].level)
        if self.params.sparsity_level_setting_mode == "local":
            densities = [kept / size for kept, size in counts]
        else:
            densities = [sum(kept for kept, _ in counts) / sum(size for _, size in counts)]
        losses = [((density - wanted) / SLACK) ** 2 for density in densities]
        frozen = keras.ops.convert_to_tensor(masks[0].frozen)
        return keras.ops.where(frozen, 0.0, sum(losses) / len(losses))

    def statistics(self, model) -> dict[str, float]:
        """Returns the sparsity, of all weights and of every layer, and the level asked for."""
        level = model.progress.get(self.name, {}).get("level", math.nan)
        return super().statistics(model) | {"sparsity_asked_for": level}
