"""Quantization-aware training."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import keras
import numpy as np

from keras_compress import scopes
from keras_compress.algorithms import calibration
from keras_compress.algorithms.base import Algorithm, check_scopes
from keras_compress.algorithms.precision_options import PrecisionInitializer, full_names
from keras_compress.algorithms.precision_rate import Widths
from keras_compress.algorithms.quantizer_options import (
    ActivationGroup,
    QuantizerGroup,
    QuantizerInitializer,
    QuantizerOverride,
    QuantizerSpec,
    RangeSpec,
    ScopeOverrides,
    StagedParams,
)
from keras_compress.algorithms.quantizer_plan import quantization_plan
from keras_compress.algorithms.staging import activation_quantizers, switch_on
from keras_compress.options import Flag, number, option
from keras_compress.quantizers import UniformQuantizer

KINDS = (UniformQuantizer,)

# Targets whose kernels may add two products of 8 bits in 16, and so overflow.
_OVERFLOWING_DEVICES = ("ANY", "CPU")


class Quantization(Algorithm):
    """Quantization of weights and activations to 2 to 8 bits, learnt in training.

    Four keys go beyond NNCF's format: `gradient_scale`, `learn_ranges`, `range_gradient` and
    `range_decay`.

    Example:

    >>> quantization = Quantization(preset="mixed", weights={"bits": 4})
    >>> quantization.weight_spec("conv").bits
    4
    >>> quantization.activation_spec("relu").mode
    'asymmetric'
    """

    name: ClassVar[str] = "quantization"
    aliases: ClassVar[tuple[str, ...]] = ("experimental_quantization",)
    stage: ClassVar[int] = 1

    preset: Literal["performance", "mixed"] = option(
        "performance", "performance: symmetric everywhere; mixed: asymmetric activations."
    )
    quantize_inputs: Flag = option(True, "Whether model inputs are quantized.")
    quantize_outputs: Flag = option(False, "Whether model outputs are quantized.")
    overflow_fix: Literal["enable", "disable", "first_layer_only"] = option(
        "enable", "Trains 8-bit weights on 7-bit levels where the CPU may overflow."
    )
    export_to_onnx_standard_ops: Flag = option(
        False,
        "Standard ONNX operations instead of custom ones.",
        status="ignored",
        reason="an ONNX export always uses QuantizeLinear and DequantizeLinear",
        neutral=(True,),
    )
    weights: QuantizerGroup = option(QuantizerGroup(), "Options of all weight quantizers.")
    activations: ActivationGroup = option(
        ActivationGroup(), "Options of all activation quantizers."
    )
    scope_overrides: ScopeOverrides = option(ScopeOverrides(), "Options of single quantizers.")
    initializer: QuantizerInitializer = option(
        QuantizerInitializer(), "What happens right after quantizers have been placed."
    )
    params: StagedParams = option(StagedParams(), "Staged quantization.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of ranges; the top-level key when not given."
    )
    gradient_scale: Literal["lsq", "none"] | None = option(
        None, "lsq: scales the gradient of ranges as LSQ does; if null, below 8 bits. Extension."
    )
    learn_ranges: Flag = option(True, "Whether ranges are trained. Extension.")
    range_gradient: Literal["rounding", "clipping"] = option(
        "rounding",
        "rounding: from rounding errors and clipped values; clipping: from clipped values alone, "
        "as PACT. Extension.",
    )
    range_decay: number(0) = option(
        0.0, "Adds this half times the sum of squared activation ranges to the loss. Extension."
    )

    @property
    def samples_needed(self) -> int:
        """Samples for the widest range estimation or for batch-norm adaptation."""
        return max(self._range_samples, self.adaptation_samples)

    @property
    def adaptation_samples(self) -> int:
        """Samples that batch normalization adapts to."""
        return self.initializer.batchnorm_adaptation.num_bn_adaptation_samples

    def plan(self, graph, config, with_data):
        """Returns which weights and edges are quantized, and how."""
        return quantization_plan(self, graph, config, with_data)

    def start(self, model, batches) -> None:
        """Sets ranges: of weights from the weights, of activations from `batches` if given."""
        calibration.calibrate_weights(self, model)
        switch_on(self.params, model, 0, KINDS)
        calibration.calibrate_activations(self, model, batches, self._range_samples)

    def update(self, model, step: int, epoch: float | None) -> bool:
        """Without calibration data, reads activation ranges off the first training batches."""
        return calibration.watch_activations(self, model, self._range_samples)

    def begin_epoch(self, model, epoch: int) -> None:
        """Switches on what has waited for this epoch; weights get their range anew then."""
        if "weights" in switch_on(self.params, model, epoch, KINDS):
            calibration.calibrate_weights(self, model)

    def loss(self, model, inputs, outputs):
        """Returns what decays the ranges of activations, or None."""
        if not self.range_decay:
            return None
        ranges = [
            quantizer.range_variables[-1]
            for quantizer in activation_quantizers(model)
            if isinstance(quantizer, KINDS) and quantizer.learnable
        ]
        return self.range_decay / 2 * sum(keras.ops.sum(keras.ops.square(r)) for r in ranges)

    @property
    def has_widths(self) -> bool:
        """Whether every quantizer has a width of its own, which can move if it was searched for.

        A search writes its result down as type `manual`.
        """
        return self.initializer.precision.type in ("hawq", "manual")

    @property
    def final_rate(self) -> float:
        """0: widths are set before training, and have no course."""
        return 0.0

    def rate(self, model) -> float:
        """Returns the fraction of the weights' bytes that the widths save against 8 bits.

        Raises:
            ConfigError: widths were not searched for.
        """
        widths = Widths(model)
        return widths.rate(widths.bits)

    def set_rate(self, model, rate: float) -> None:
        """Gives the weights the widths of least predicted loss that save so much, or more.

        Quantizers change in place, between two epochs: weights, masks, statistics and the
        optimizer's state stay. Ranges of weights whose width changes are set anew.

        Raises:
            ConfigError: widths were not searched for, or cannot save so much. The model is as it
                was then.
        """
        widths = Widths(model)
        widths.apply(widths.at(rate))

    def gradient_scale_at(self, bits: int) -> str | None:
        """Returns how the gradient of a range is scaled at a width: below 8 bits, as LSQ does."""
        chosen = self.gradient_scale or ("lsq" if bits < 8 else "none")
        return None if chosen == "none" else chosen

    def finish(self, model) -> None:
        """Makes do with the samples seen when training ended early."""
        calibration.set_activation_ranges(model)

    def statistics(self, model) -> dict[str, float]:
        """Returns the mean width of weight and activation quantizers and their number."""
        quantizers = model.quantizers()
        bits = np.array([quantizer.bits for quantizer in quantizers], "float64")
        return {"quantizers": len(bits), "mean_bits": bits.mean() if len(bits) else 0.0}

    @property
    def _range_samples(self) -> int:
        overrides = [*self.scope_overrides.weights.values()]
        overrides += self.scope_overrides.activations.values()
        chosen = [override.initializer.range for override in overrides]
        counts = [
            entry.num_init_samples
            for entry in (*self.initializer.ranges, *chosen)
            if entry is not None
        ]
        return max(counts, default=RangeSpec().num_init_samples)

    def weight_spec(self, layer_name: str) -> QuantizerSpec:
        """Returns what the weight quantizer of a layer shall be.

        Precedence, weakest first: preset, `weights`, widths chosen by hand or by search, every
        matching entry of `scope_overrides.weights` in the order written.
        """
        return self._spec("weights", layer_name, mode="symmetric", per_channel=True)

    def activation_spec(self, edge_name: str) -> QuantizerSpec:
        """Returns what the activation quantizer on an edge shall be. See `weight_spec`."""
        mode = "asymmetric" if self.preset == "mixed" else "symmetric"
        return self._spec("activations", edge_name, mode=mode, per_channel=False)

    def selects_weight(self, name: str) -> bool:
        """Says whether both the general and the weights' own scopes choose a node."""
        return self.selects(name) and self.weights.selects(name)

    def selects_activation(self, name: str) -> bool:
        """Says whether both the general and the activations' own scopes choose a node."""
        return self.selects(name) and self.activations.selects(name)

    def overflow_fix_applies(
        self, target_device: str, bits: int, first_layer: bool = False
    ) -> bool:
        """Says whether weights are trained on half the range, against overflow on the device.

        Args:
            target_device: The device of the configuration.
            bits: Width of the weights; only 8 can overflow.
            first_layer: Whether the layer is the first quantized one behind an input.
        """
        if bits != 8 or target_device not in _OVERFLOWING_DEVICES:
            return False
        return self.overflow_fix == "enable" or (
            self.overflow_fix == "first_layer_only" and first_layer
        )

    def overridden_bits(self, group: str, name: str) -> int | None:
        """Returns the width that `scope_overrides` give a quantizer, or None."""
        overrides = getattr(self.scope_overrides, group).items()
        found = [each.bits for pattern, each in overrides if scopes.matches(pattern, name)]
        return next((bits for bits in reversed(found) if bits is not None), None)

    def with_widths(self, widths: dict[str, int]) -> "Quantization":
        """Returns the same options with widths chosen: `{full name of a quantizer: bits}`."""
        pairs = [(bits, name) for name, bits in widths.items()]
        kept = dict(_written(self.initializer.precision))
        kept = {key: kept[key] for key in ("bitwidth_assignment_mode",) if key in kept}
        by_hand = PrecisionInitializer(type="manual", bitwidth_per_scope=pairs, **kept)
        initializer = self.initializer.model_copy(update={"precision": by_hand})
        initializer = type(initializer)(**dict(_written(initializer)))
        return type(self)(**dict(_written(self)) | {"initializer": initializer})

    def check_scopes(self, weights: Iterable[str], activations: Iterable[str]) -> None:
        """Makes sure that every scope entry matches a node, where `validate_scopes` says so.

        Args:
            weights: Names by which weight quantizers are chosen.
            activations: Names by which activation quantizers are chosen.

        Raises:
            ConfigError: If an entry matches nothing.
        """
        names = {"weights": list(weights), "activations": list(activations)}
        everything = [*names["weights"], *names["activations"]]
        for group, entries in self._checked_scopes():
            check_scopes(entries, names.get(group, everything))
        by_hand = self.initializer.precision.scope_lists("initializer.precision.")
        check_scopes(by_hand, full_names(weights=names["weights"], activations=everything))

    def _checked_scopes(self) -> Iterator[tuple[str, list]]:
        """Yields `(group or "", [(where written, entries)])` for all scope keys to validate."""
        if self.validate_scopes:
            yield "", list(self.scope_lists())
            for entry in self.initializer.ranges:
                yield entry.target_quantizer_group, list(entry.scope_lists("initializer.range."))
        for group in ("weights", "activations"):
            options = getattr(self, group)
            overrides = getattr(self.scope_overrides, group)
            if options.validate_scopes:
                yield group, list(options.scope_lists(f"{group}."))
            if self.validate_scopes and overrides:
                yield group, [(f"scope_overrides.{group}", tuple(overrides))]
        for nodes in self.activations.unified_scale_ops or ():
            yield "activations", [("activations.unified_scale_ops", nodes)]

    def _spec(self, group: str, name: str, **values) -> QuantizerSpec:
        values["range"] = self.initializer.range_spec(group, name)
        options = getattr(self, group)
        overrides = getattr(self.scope_overrides, group)
        by_hand = QuantizerOverride(bits=self.initializer.precision.bits_of(group, name))
        chosen = [o for p, o in overrides.items() if scopes.matches(p, name)]
        layers = [options, by_hand, *chosen]
        for layer in layers:
            for key in ("mode", "bits", "signed", "per_channel"):
                value = getattr(layer, key)
                if value is not None or key not in values:
                    values[key] = value
        for override in layers[1:]:
            if override.initializer.range is not None:
                values["range"] = override.initializer.range.spec()
        return QuantizerSpec(**values)


def _written(options):
    """Yield (key, value) of the keys that were written."""
    for name in options.model_fields_set:
        yield name, getattr(options, name)
