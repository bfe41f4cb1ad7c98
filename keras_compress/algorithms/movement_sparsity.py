"""Movement sparsity: weights that shrink in training set to zero."""

import functools
import logging
import math
from typing import ClassVar, Literal

import keras
import pydantic

from keras_compress import scopes
from keras_compress.algorithms.movement_structure import (
    BlockMask,
    channel_masks,
    first_threshold,
    mask_structure,
    resolve,
)
from keras_compress.algorithms.weight_sparsity import WeightSparsity
from keras_compress.compressed_layer import PACKAGE
from keras_compress.options import ConfigError, Flag, Options, integer, number, option
from keras_compress.plan import Plan
from keras_compress.scopes import Scopes
from keras_compress.weight_masks import MovementMask

logger = logging.getLogger(PACKAGE)

SMALLEST_SHARE = 0.001  # of the weights may go at the start of the warm-up


class SparseStructure(Options):
    """The pattern in which weights of some layers are zeroed."""

    mode: Literal["fine", "block", "per_dim"] = option(
        "fine", "fine: single weights; block: rectangles; per_dim: slices along one axis."
    )
    sparse_factors: tuple[integer(1), ...] | None = option(None, "Size of a block.")
    axis: integer() | None = option(None, "Axis of the slices.")
    target_scopes: Scopes | None = option(None, "The layers it holds for.")

    @pydantic.model_validator(mode="after")
    def _check_mode(self):
        if (self.sparse_factors is not None) != (self.mode == "block"):
            raise ValueError(
                "expected `sparse_factors` with the mode 'block', and only then. Received: "
                f"mode={self.mode!r}, sparse_factors={self.sparse_factors}"
            )
        if (self.axis is not None) != (self.mode == "per_dim"):
            raise ValueError(
                "expected `axis` with the mode 'per_dim', and only then. Received: "
                f"mode={self.mode!r}, axis={self.axis}"
            )
        if self.sparse_factors is not None and len(self.sparse_factors) != 2:
            raise ValueError(
                "expected the size of a block along outputs and inputs, such as [32, 32]. "
                f"Received: sparse_factors={list(self.sparse_factors)}"
            )
        if self.axis not in (None, 0, 1):
            raise ValueError(f"expected 0 for outputs, or 1 for inputs. Received: axis={self.axis}")
        return self


class MovementSparsityParams(Options):
    """Course of the threshold and of the regularization."""

    warmup_start_epoch: number(0) = option(..., "Epoch that begins the warm-up.")
    warmup_end_epoch: number(0) = option(..., "Epoch that ends it.")
    importance_regularization_factor: number(0) = option(..., "Final weight of the penalty.")
    enable_structured_masking: Flag = option(
        True, "Whether masks become whole structures after the warm-up."
    )
    power: number(0) = option(3.0, "Exponent of the course.")
    init_importance_threshold: number() | None = option(
        None, "Threshold to start with; found from the weights when not given."
    )
    final_importance_threshold: number() = option(0.0, "Threshold to end with.")
    steps_per_epoch: integer(1) | None = option(None, "Steps in an epoch.")

    def course(self, epoch: float) -> float:
        """Returns how far the warm-up is, in [0, 1].

        `1 - (1 - p)^power` with `p = (epoch - start) / (end - start)`, clipped to [0, 1].
        """
        start, end = self.warmup_start_epoch, self.warmup_end_epoch
        p = min(max((epoch - start) / (end - start), 0.0), 1.0)
        return 1 - (1 - p) ** self.power

    @pydantic.model_validator(mode="after")
    def _check_warmup(self):
        if self.warmup_end_epoch <= self.warmup_start_epoch:
            raise ValueError(
                "expected a warm-up that ends after it begins. Received: warmup_start_epoch="
                f"{self.warmup_start_epoch}, warmup_end_epoch={self.warmup_end_epoch}"
            )
        return self


class MovementSparsity(WeightSparsity):
    """Sparsity that zeroes the weights that training moves towards zero.

    Every weight, or block of weights, has an importance that is trained along with it; those that
    are not above a threshold are off. Threshold and penalty grow during the warm-up with the epoch
    e, `c(e)` being `params.course(e)`:

        threshold = init + (final - init) * c(e)
        loss = importance_regularization_factor * c(e) / 2 * mean over weights of mask.penalty()

    Before the warm-up everything is on and the loss is 0. At the first epoch after it masks are
    fixed, and with `enable_structured_masking` resolved into whole channels: see `resolve`.

    Example:

    >>> course = MovementSparsity(params={
    ...     "warmup_start_epoch": 1,
    ...     "warmup_end_epoch": 3,
    ...     "importance_regularization_factor": 0.1,
    ... }).params.course
    >>> [course(epoch) for epoch in (0, 1, 2, 3)]
    [0.0, 0.0, 0.875, 1.0]

    Reference: Sanh et al., "Movement pruning" (arXiv:2005.07683); Lagunas et al., "Block pruning
    for faster transformers" (arXiv:2109.04838).
    """

    name: ClassVar[str] = "movement_sparsity"

    params: MovementSparsityParams = option(..., "Course of threshold and penalty.")
    sparse_structure_by_scopes: tuple[SparseStructure, ...] = option((), "Patterns by layer.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of importances; the top-level key when not given."
    )

    def scope_lists(self, prefix=""):
        """Yields `(where it was written, entries)`, those of the structures too."""
        yield from super().scope_lists(prefix)
        for index, structure in enumerate(self.sparse_structure_by_scopes):
            if structure.target_scopes is not None:
                where = f"{prefix}sparse_structure_by_scopes[{index}].target_scopes"
                yield where, structure.target_scopes

    def structure(self, name: str) -> SparseStructure:
        """Returns the pattern of a layer: the first whose scopes match, else single weights."""
        for structure in self.sparse_structure_by_scopes:
            if structure.target_scopes is None or scopes.matches(structure.target_scopes, name):
                return structure
        return SparseStructure()

    def plan(self, graph, config, with_data):
        """Returns which weights are masked, channel by channel too where whole ones may go."""
        decided = super().plan(graph, config, with_data)
        if not self.params.enable_structured_masking:
            return decided
        if any(other.name == "filter_pruning" for other in config.algorithms):
            raise ConfigError(
                "Expected one algorithm that takes channels away. Received: filter_pruning and "
                "movement_sparsity with enable_structured_masking=True. Set it to false."
            )
        weights = {(entry.layer, entry.weight) for entry in decided.weights}
        entries = channel_masks(graph, weights)
        note = (
            "Masks become whole channels after the warm-up where every weight of a channel is off."
            if entries
            else "No channels can be removed as a whole: masks stay as they were learnt."
        )
        return decided.merge(Plan(graph.name, weights=entries, notes=(note,)))

    def make_mask(self, config, node, weight):
        """Returns what makes a `MovementMask`, and its description."""
        arguments = mask_structure(self.structure(node.name), node.op, weight)
        text = {
            "per_dim": f"of slices along axis {arguments.get('axis')}",
            "block": f"of blocks {arguments.get('sparse_factors')}",
        }.get(arguments.get("mode"), "of single weights")
        # Only with structured masking are masks fixed before anything is cut.
        may_be_cut = self.params.enable_structured_masking and arguments.get("mode") == "block"
        make = self.named(BlockMask if may_be_cut else MovementMask, **arguments)
        make = functools.partial(make, lr_multiplier=self.gradient_factor(config))
        return make, f"learnt mask {text}"

    def start(self, model, batches) -> None:
        """Begins with epoch 0."""
        self.begin_epoch(model, 0)

    def begin_epoch(self, model, epoch: int) -> None:
        """Fixes the masks at the first epoch after the warm-up."""
        if self.masks_are_final(model):
            return
        self._move(model, epoch)
        if epoch >= self.params.warmup_end_epoch:
            self._fix(model)

    def update(self, model, step: int, epoch: float | None) -> bool:
        """Moves threshold and penalty in every step, until masks are fixed."""
        if self.masks_are_final(model):
            return False
        if self.params.steps_per_epoch is not None:
            epoch = step / self.params.steps_per_epoch
        if epoch is not None:
            self._move(model, epoch)
        return True

    def finish(self, model) -> None:
        """Fixes the masks where training ended together with the warm-up."""
        reached = model.progress.get(self.name, {})
        if not self.masks_are_final(model) and reached.get("epoch", 0) >= (
            self.params.warmup_end_epoch
        ):
            self._fix(model)

    def masks_are_final(self, model) -> bool:
        """Says whether masks are fixed."""
        return model.progress.get(self.name, {}).get("frozen", False)

    def loss(self, model, inputs, outputs):
        """Returns the penalty that draws importances down."""
        masks = [entry.mask for entry in self.masked(model)]
        factor = keras.ops.convert_to_tensor(masks[0].factor)
        return factor / 2 * (sum(mask.penalty() for mask in masks) / len(masks))

    def statistics(self, model) -> dict[str, float]:
        """Returns the sparsity, of all weights and of every layer, threshold and factor."""
        reached = model.progress.get(self.name, {})
        threshold = reached.get("threshold")
        return super().statistics(model) | {
            "importance_threshold": -math.inf if threshold is None else threshold,
            "importance_regularization_factor": reached.get("factor", 0.0),
        }

    def _move(self, model, epoch):
        """Set threshold and factor of an epoch; they never fall behind what was reached."""
        reached = model.progress.get(self.name, {})
        if epoch <= reached.get("epoch", -1):
            return
        params = self.params
        now = {"epoch": epoch, "frozen": False, "threshold": None, "factor": 0.0}
        if epoch >= params.warmup_start_epoch:
            masks = [entry.mask for entry in self.masked(model)]
            first = reached.get("first_threshold", params.init_importance_threshold)
            if first is None:
                first = first_threshold(masks, SMALLEST_SHARE)
            done = params.course(epoch)
            now["first_threshold"] = first
            now["threshold"] = first + (params.final_importance_threshold - first) * done
            now["factor"] = params.importance_regularization_factor * done
            for mask in masks:
                mask.threshold.assign(now["threshold"])
                mask.factor.assign(now["factor"])
        model.progress[self.name] = now

    def _fix(self, model):
        masks = {(entry.layer.name, entry.weight): entry.mask for entry in self.masked(model)}
        if self.params.enable_structured_masking:
            learnt = self.sparsity(model)
            resolve(model.graph(), masks)
            self._warn_of_lost_zeros(learnt, self.sparsity(model))
        else:
            for mask in masks.values():
                mask.fix()
        model.progress[self.name] = dict(model.progress[self.name]) | {"frozen": True}

    def _warn_of_lost_zeros(self, learnt, kept):
        """Say so where most zeros were not part of whole channels."""
        if kept < learnt / 2:
            logger.warning(
                "movement_sparsity: of a sparsity of %.1f%%, %.1f%% is left as whole channels. "
                "Choose `sparse_structure_by_scopes` that take whole channels away, such as "
                "'per_dim', or set `enable_structured_masking` to false to keep every zero.",
                100 * learnt,
                100 * kept,
            )
