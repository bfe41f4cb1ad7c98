"""Quantization-aware training."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import numpy as np

from keras_compress import scopes
from keras_compress.algorithms import calibration
from keras_compress.algorithms.base import Algorithm, check_scopes
from keras_compress.algorithms.quantizer_options import (
    ActivationGroup,
    QuantizerGroup,
    QuantizerInitializer,
    QuantizerSpec,
    RangeSpec,
    ScopeOverrides,
    StagedParams,
)
from keras_compress.algorithms.quantizer_plan import quantization_plan
from keras_compress.options import Flag, number, option

# Targets whose kernels may add two products of 8 bits in 16, and so overflow.
_OVERFLOWING_DEVICES = ("ANY", "CPU")


class Quantization(Algorithm):
    """Quantization of weights and activations to 2 to 8 bits, learnt in training.

    Two keys go beyond NNCF's format: `gradient_scale` and `learn_ranges`.

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
    gradient_scale: Literal["lsq"] | None = option(
        None, "lsq: divides the gradient of ranges by sqrt(values * highest level). Extension."
    )
    learn_ranges: Flag = option(True, "Whether ranges are trained. Extension.")

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
        if batches is None:
            return
        calibration.observe_activations(self, model)
        calibration.run(model, batches, self._range_samples)
        calibration.set_activation_ranges(model)

    def update(self, model, step: int, epoch: float | None) -> bool:
        """Without calibration data, reads activation ranges off the first training batches."""
        seen = calibration.samples_seen(model)
        if seen is None:
            calibration.observe_activations(self, model)
        elif seen >= self._range_samples:
            calibration.set_activation_ranges(model)
        return calibration.samples_seen(model) is not None

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
        entries = self.initializer.range
        entries = entries if isinstance(entries, tuple) else (entries,)
        overrides = [*self.scope_overrides.weights.values()]
        overrides += self.scope_overrides.activations.values()
        chosen = [override.initializer.range for override in overrides]
        counts = [entry.num_init_samples for entry in (*entries, *chosen) if entry is not None]
        return max(counts, default=RangeSpec().num_init_samples)

    def weight_spec(self, layer_name: str) -> QuantizerSpec:
        """Returns what the weight quantizer of a layer shall be.

        Precedence, weakest first: preset, `weights`, every matching entry of
        `scope_overrides.weights` in the order written.
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

    def _checked_scopes(self) -> Iterator[tuple[str, list]]:
        """Yields `(group or "", [(where written, entries)])` for all scope keys to validate."""
        if self.validate_scopes:
            yield "", list(self.scope_lists())
            ranges = self.initializer.range
            for entry in ranges if isinstance(ranges, tuple) else (ranges,):
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
        layers = [options, *(o for p, o in overrides.items() if scopes.matches(p, name))]
        for layer in layers:
            for key in ("mode", "bits", "signed", "per_channel"):
                value = getattr(layer, key)
                if value is not None or key not in values:
                    values[key] = value
        for override in layers[1:]:
            if override.initializer.range is not None:
                values["range"] = override.initializer.range.spec()
        return QuantizerSpec(**values)
