"""The option objects that quantization is made of: groups of quantizers, ranges, precision."""

import dataclasses
from typing import Literal

import pydantic

from keras_compress.algorithms.base import Initializer, ScopedOptions, ValidatedScopes
from keras_compress.options import Flag, Options, Text, integer, number, one_or_many, option
from keras_compress.scopes import Pattern, Scopes

Bits = integer(2, 8)
Group = Literal["weights", "activations"]
Mode = Literal["symmetric", "asymmetric"]
RangeType = Literal[
    "mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"
]

_NO_PRECISION = "not built yet: mixed precision is planned for a later release; use scope_overrides"
_NO_LOGARITHM = "not built yet: ranges are trained as they are, not as logarithms"
_NO_STAGES = "not built yet: staged quantization is planned for a later release"


@dataclasses.dataclass(frozen=True)
class RangeSpec:
    """How the first range of one quantizer is estimated.

    Args:
        type: The estimator.
        num_init_samples: Samples to look at.
        min_percentile: Percentile that becomes the lower end, for the percentile estimators.
        max_percentile: Percentile that becomes the upper end.
    """

    type: str = "mixed_min_max"
    num_init_samples: int = 256
    min_percentile: float = 0.1
    max_percentile: float = 99.9


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

    type: RangeType = option("mixed_min_max", "The estimator.")
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


class PrecisionInitializer(Options):
    """How every quantizer finds its own width."""

    type: Literal["hawq", "autoq", "manual"] | None = option(None, "The method.")
    bits: tuple[Bits, ...] = option((2, 4, 8), "Candidate widths.")
    num_data_points: integer(1) = option(100, "Samples for the trace of the Hessian.")
    iter_number: integer(0) | None = option(None, "Iteration cap: 200 for HAWQ, 0 for AutoQ.")
    tolerance: number(0) = option(1e-4, "Relative change at which the trace has converged.")
    compression_ratio: number(0) | None = option(
        None,
        "HAWQ: bit complexity at 8 bits over mixed, at least (1.5). "
        "AutoQ: size over float size, at most (0.15).",
    )
    eval_subset_ratio: number(0, 1) = option(1.0, "AutoQ: fraction of the evaluation data to use.")
    warmup_iter_number: integer(0) = option(20, "AutoQ: random policies to begin with.")
    bitwidth_per_scope: tuple[tuple[Bits, Pattern], ...] | None = option(
        None, "Widths chosen by hand, as pairs of bits and scope."
    )
    traces_per_layer_path: Text | None = option(None, "File with traces of an earlier run.")
    dump_init_precision_data: Flag = option(False, "Whether to write debugging data.")
    bitwidth_assignment_mode: Literal["strict", "liberal"] = option(
        "liberal", "strict: quantizers that feed one consumer get equal widths."
    )


class QuantizerInitializer(Initializer):
    """What happens once, right after quantizers have been placed."""

    range: one_or_many(ScopedRangeInitializer) = option(
        (), "How initial ranges are estimated; in a list, the first entry that covers one counts."
    )
    precision: PrecisionInitializer | None = option(
        None, "Mixed precision.", status="refused", reason=_NO_PRECISION
    )

    def range_spec(self, group: str, name: str) -> RangeSpec:
        """Returns how the range of one quantizer is estimated."""
        entries = self.range if isinstance(self.range, tuple) else (self.range,)
        for entry in entries:
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
    """Staged quantization: switching quantizers on in the course of training."""

    batch_multiplier: integer(1) | None = option(
        None, "Batches whose gradients are added up.", status="refused", reason=_NO_STAGES
    )
    activations_quant_start_epoch: number(0) = option(
        1, "Epoch that switches activations on.", status="refused", reason=_NO_STAGES
    )
    weights_quant_start_epoch: number(0) = option(
        1, "Epoch that switches weights on.", status="refused", reason=_NO_STAGES
    )
    lr_poly_drop_start_epoch: number(0) | None = option(
        None, "Epoch that begins the learning rate drop.", status="refused", reason=_NO_STAGES
    )
    lr_poly_drop_duration_epochs: number(0) = option(
        30, "Length of the learning rate drop.", status="refused", reason=_NO_STAGES
    )
    disable_wd_start_epoch: number(0) | None = option(
        None, "Epoch that stops weight decay.", status="refused", reason=_NO_STAGES
    )
    base_lr: number(0) = option(1e-3, "Initial learning rate.", status="refused", reason=_NO_STAGES)
    base_wd: number(0) = option(1e-5, "Initial weight decay.", status="refused", reason=_NO_STAGES)
