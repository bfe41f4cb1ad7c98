"""Magnitude sparsity: small weights set to zero."""

import re
from typing import ClassVar, Literal

import numpy as np
import pydantic

from keras_compress import sparsity
from keras_compress.algorithms.base import Initializer
from keras_compress.algorithms.sparsity_options import Sparsity, SparsityParams
from keras_compress.algorithms.weight_sparsity import ScheduledSparsity, input_axis
from keras_compress.compressed_layer import layer_spec, require_finite
from keras_compress.options import Text, integer, number, option
from keras_compress.weight_masks import WeightMask


class MagnitudeSparsityParams(SparsityParams):
    """Course of the level, and the score of a weight."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = option(
        "polynomial", "Course of the level."
    )
    weight_importance: Literal["normed_abs", "abs"] = option(
        "normed_abs", "normed_abs: magnitude over the norm of the layer; abs: magnitude."
    )
    sparsity_pattern: Text = option(
        "unstructured",
        "unstructured: single weights; block: rectangles; N:M such as 2:4: of every M consecutive "
        "weights along the input axis N stay. Extension.",
    )
    block_shape: tuple[integer(1), ...] = option(
        (4, 4), "Size of a block along the input and the output axis. Extension."
    )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M of the pattern N:M, or None."""
        found = re.fullmatch(r"(\d+):(\d+)", self.sparsity_pattern)
        return found and (int(found[1]), int(found[2]))

    @property
    def final_sparsity(self) -> float:
        """The level in the end: that of the pattern where it is N:M."""
        if self.n_of_m:
            n, m = self.n_of_m
            return 1 - n / m
        return super().final_sparsity

    @pydantic.model_validator(mode="after")
    def _check_pattern(self):
        pattern = f"Received: sparsity_pattern={self.sparsity_pattern!r}"
        if self.n_of_m:
            n, m = self.n_of_m
            if not 0 < n < m:
                raise ValueError(f"expected N:M with 0 < N < M, such as 2:4. {pattern}")
            if "sparsity_target" in self.model_fields_set and not np.isclose(
                self.sparsity_target, self.final_sparsity
            ):
                raise ValueError(
                    f"expected no sparsity_target, or {self.final_sparsity:.6g}, which the pattern "
                    f"has. {pattern}, sparsity_target={self.sparsity_target}"
                )
        elif self.sparsity_pattern not in ("unstructured", "block"):
            raise ValueError(f"expected 'unstructured', 'block' or N:M such as '2:4'. {pattern}")
        if len(self.block_shape) != 2:
            raise ValueError(f"expected two sizes. Received: block_shape={list(self.block_shape)}")
        return self


class MagnitudeSparsity(ScheduledSparsity):
    """Sparsity that zeroes the weights of least magnitude.

    Example:

    >>> sparsity = MagnitudeSparsity(params={"sparsity_target": 0.8, "sparsity_target_epoch": 4})
    >>> [round(sparsity.schedule(epoch), 3) for epoch in range(5)]
    [0.0, 0.182, 0.371, 0.57, 0.8]
    """

    name: ClassVar[str] = "magnitude_sparsity"

    sparsity_init: Sparsity = option(0.0, "Sparsity to start with.")
    initializer: Initializer = option(Initializer(), "What happens right after masks are placed.")
    params: MagnitudeSparsityParams = option(MagnitudeSparsityParams(), "Course and score.")
    compression_lr_multiplier: number(0) | None = option(
        None,
        "Accepted for the shared format.",
        status="ignored",
        reason="magnitude sparsity trains no parameters of its own",
    )

    @property
    def adaptation_samples(self) -> int:
        """Samples that batch normalization adapts to, where weights are masked at once."""
        wanted = self.initializer.batchnorm_adaptation.num_bn_adaptation_samples
        return wanted if self.level_at_start > 0 else 0

    @property
    def samples_needed(self) -> int:
        """Samples for batch-norm adaptation."""
        return self.adaptation_samples

    def why_not(self, node) -> str:
        """Returns why a layer with weights is left alone, or an empty string."""
        weights = layer_spec(node.op).weights
        if self.params.n_of_m and all(input_axis(node.op, weight) is None for weight in weights):
            return f"it sums over no axis that {self.params.sparsity_pattern} could go along"
        return super().why_not(node)

    def make_mask(self, config, node, weight):
        """Returns what makes a `WeightMask`, and its description."""
        pattern = self.params.sparsity_pattern
        text = f"mask, {self.params.final_sparsity:.1%} zeros"
        return self.named(WeightMask), text + ("" if pattern == "unstructured" else f", {pattern}")

    def set_level(self, model, level: float) -> None:
        """Switches off the weights of least magnitude."""
        set_magnitude_masks(self.params, self.masked(model), level)

    @pydantic.model_validator(mode="after")
    def _check_start(self):
        if self.sparsity_init > self.params.final_sparsity:
            raise ValueError(
                "expected a start that is not above the target. Received: "
                f"sparsity_init={self.sparsity_init}, target {self.params.final_sparsity:.6g}"
            )
        return self


def set_magnitude_masks(params, masked, level):
    """Switch off the weights of least magnitude.

    Args:
        params: `MagnitudeSparsityParams`: pattern, score, and whether layers are ranked together.
        masked: list of `MaskedWeight`.
        level: fraction that goes, in [0, 1).
    """
    for part, masks in _parts_with_masks(params, masked, level):
        for entry, mask in zip(part, masks, strict=True):
            entry.mask.set_mask(mask)


def _parts_with_masks(params, masked, level):
    """Return pairs (weights that are ranked together, their masks), before any mask is set."""
    together = params.sparsity_level_setting_mode == "global" and not params.n_of_m
    found = []
    for part in [masked] if together else [[entry] for entry in masked]:
        weights = [entry.value() for entry in part]
        try:
            found.append((part, _masks(params, part, weights, level)))
        except ValueError:
            for entry, values in zip(part, weights, strict=True):
                require_finite(entry.layer, entry.weight, values)
            raise
    return found


def _masks(params, part, weights, level):
    if params.n_of_m:
        _, m = params.n_of_m
        n = m - sparsity.removed_count(m, level)
        axes = [entry.input_axis for entry in part]
        return [
            np.ones(weight.shape, bool) if axis is None else sparsity.n_of_m(weight, n, m, axis)
            for weight, axis in zip(weights, axes, strict=True)
        ]
    if params.sparsity_pattern == "unstructured":
        return sparsity.smallest(weights, level, params.weight_importance)
    scores = [sparsity.importances(weight, params.weight_importance) for weight in weights]
    means = [sparsity.block_means(score, params.block_shape) for score in scores]
    stays = sparsity.smallest(means, level)
    pairs = zip(stays, weights, strict=True)
    return [sparsity.spread(stay, weight.shape, params.block_shape) for stay, weight in pairs]
