"""The option objects that quantization is made of: groups of quantizers, ranges, precision."""

import dataclasses
from typing import Literal

import pydantic

from keras_compress.algorithms.base import Initializer, ScopedOptions, ValidatedScopes
from keras_compress.algorithms.precision_options import Bits, PrecisionInitializer
from keras_compress.options import Flag, Options, integer, number, one_or_many, option
from keras_compress.scopes import Pattern, Scopes

Group = Literal["weights", "activations"]
Mode = Literal["symmetric", "asymmetric"]
RangeType = Literal[
    "mixed_min_max",
    "min_max",
    "mean_min_max",
    "threesigma",
    "percentile",
    "mean_percentile",
    "mse",
]

_NO_LOGARITHM = "not built yet: ranges are trained as they are, not as logarithms"
_OPTIMIZER = "the training script's: set it on the optimizer"


@dataclasses.dataclass(frozen=True)
class RangeSpec:
    """How the first range of one quantizer is estimated.

    Args:
        type: The estimator; None: by the width, see `estimator`.
        num_init_samples: Samples to look at.
        min_percentile: Percentile that becomes the lower end, for the percentile estimators.
        max_percentile: Percentile that becomes the upper end.
    """

    type: str | None = None
    num_init_samples: int = 256
    min_percentile: float = 0.1
    max_percentile: float = 99.9

    def estimator(self, bits: int) -> str:
        """Returns the name of the estimator for a width.

        At 8 bits the extremes matter most; below, the error that is left.
        """
        return self.type or ("mixed_min_max" if bits >= 8 else "mse")


@dataclasses.dataclass(frozen=True)
class QuantizerSpec:
    """What one quantizer shall be, once every option has had its say.

    Args:
        mode: `"symmetric"` or `"asymmetric"`.
        bits: Width, 2 to 8.
        signed: True, False, or None to decide from the statistics.
        per_channel: One range per channel instead of one per tensor.
        range: How the first range is estimated.
    """

    mode: str
    bits: int
    signed: bool | None
    per_channel: bool
    range: RangeSpec = RangeSpec()


class RangeParams(Options):
    """Which percentiles the percentile estimators take."""

    min_percentile: number(0, 100) = option(0.1, "Percentile that becomes the lower end.")
    max_percentile: number(0, 100) = option(99.9, "Percentile that becomes the upper end.")

    @pydantic.model_validator(mode="after")
    def _check_order(self):
        if self.min_percentile >= self.max_percentile:
            raise ValueError(
                "expected min_percentile below max_percentile. Received: "
                f"min_percentile={self.min_percentile}, max_percentile={self.max_percentile}"
            )
        return self


class RangeInitializer(Options):
    """How initial ranges are estimated."""

    type: RangeType | None = option(
        None, "The estimator; when not given, mixed_min_max at 8 bits and mse below."
    )
    num_init_samples: integer(1) = option(256, "Calibration samples.")
    params: RangeParams = option(RangeParams(), "Percentiles, for the percentile estimators.")

    def spec(self) -> RangeSpec:
        """Returns the same as plain data."""
        return RangeSpec(
            self.type,
            self.num_init_samples,
            self.params.min_percentile,
            self.params.max_percentile,
        )


class ScopedRangeInitializer(RangeInitializer, ScopedOptions):
    """How initial ranges are estimated for some of the quantizers."""

    target_quantizer_group: Group | None = option(
        None, "Covers only the quantizers of this group; both when not given."
    )

    def covers(self, group: str, name: str) -> bool:
        """Says whether it covers the quantizer of a group at a node."""
        return self.target_quantizer_group in (None, group) and self.selects(name)


class QuantizerInitializer(Initializer):
    """What happens once, right after quantizers have been placed."""

    range: one_or_many(ScopedRangeInitializer) = option(
        (), "How initial ranges are estimated; in a list, the first entry that covers one counts."
    )
    precision: PrecisionInitializer = option(
        PrecisionInitializer(), "Mixed precision: a width for every quantizer."
    )

    @property
    def ranges(self) -> tuple[ScopedRangeInitializer, ...]:
        """The entries of `range`, whether one was written or a list."""
        return self.range if isinstance(self.range, tuple) else (self.range,)

    def range_spec(self, group: str, name: str) -> RangeSpec:
        """Returns how the range of one quantizer is estimated."""
        for entry in self.ranges:
            if entry.covers(group, name):
                return entry.spec()
        return RangeSpec()


class QuantizerGroup(ValidatedScopes):
    """Options of all weight quantizers, or of all activation quantizers."""

    mode: Mode | None = option(None, "Kind of grid; from the preset when not given.")
    bits: Bits = option(8, "Width.")
    signed: Flag | None = option(None, "Whether values have both signs; from statistics if null.")
    per_channel: Flag | None = option(
        None, "One range per channel; if null, weights yes where the layer allows, activations no."
    )
    logarithm_scale: Flag = option(
        False,
        "Trains the logarithm of the scale.",
        status="refused",
        reason=_NO_LOGARITHM,
        neutral=(False,),
    )


class ActivationGroup(QuantizerGroup):
    """Options of all activation quantizers."""

    unified_scale_ops: tuple[Scopes, ...] | None = option(
        None, "Lists of nodes; the inputs of each list share one quantizer."
    )


class OverrideInitializer(Options):
    """How the range of an overridden quantizer is estimated."""

    range: RangeInitializer | None = option(None, "How the initial range is estimated.")


class QuantizerOverride(Options):
    """Options of the quantizers at some nodes, stronger than those of their group."""

    mode: Mode | None = option(None, "Kind of grid.")
    bits: Bits | None = option(None, "Width.")
    signed: Flag | None = option(None, "Whether values have both signs.")
    per_channel: Flag | None = option(None, "One range per channel.")
    initializer: OverrideInitializer = option(OverrideInitializer(), "Range estimation.")


class ScopeOverrides(Options):
    """Overrides by scope entry, for weights and for activations."""

    weights: dict[Pattern, QuantizerOverride] = option({}, "Overrides of weight quantizers.")
    activations: dict[Pattern, QuantizerOverride] = option({}, "Overrides of activations.")


class StagedParams(Options):
    """Staged quantization: switching quantizers on in the course of training.

    Where one of the two start epochs is written, both hold; else all quantizers round from the
    start.

    Example:

    >>> params = StagedParams(weights_quant_start_epoch=3)
    >>> params.start_epoch("weights"), params.start_epoch("activations")
    (3, 1)
    >>> StagedParams().stages("weights")
    False
    """

    batch_multiplier: integer(1) | None = option(
        None, "Batches whose gradients are added up.", status="ignored", reason=_OPTIMIZER
    )
    activations_quant_start_epoch: number(0) = option(1, "Epoch that switches activations on.")
    weights_quant_start_epoch: number(0) = option(1, "Epoch that switches weights on.")
    lr_poly_drop_start_epoch: number(0) | None = option(
        None, "Epoch that begins the learning rate drop.", status="ignored", reason=_OPTIMIZER
    )
    lr_poly_drop_duration_epochs: number(0) = option(
        30, "Length of the learning rate drop.", status="ignored", reason=_OPTIMIZER
    )
    disable_wd_start_epoch: number(0) | None = option(
        None, "Epoch that stops weight decay.", status="ignored", reason=_OPTIMIZER
    )
    base_lr: number(0) = option(1e-3, "Initial learning rate.", status="ignored", reason=_OPTIMIZER)
    base_wd: number(0) = option(1e-5, "Initial weight decay.", status="ignored", reason=_OPTIMIZER)

    def start_epoch(self, group: str) -> float:
        """Returns the epoch that switches a group of quantizers on; 0 where nothing is staged."""
        if self.model_fields_set.isdisjoint(
            ("activations_quant_start_epoch", "weights_quant_start_epoch")
        ):
            return 0
        return getattr(self, f"{group}_quant_start_epoch")

    def stages(self, group: str) -> bool:
        """Says whether the quantizers of a group wait for their epoch."""
        return self.start_epoch(group) > 0
