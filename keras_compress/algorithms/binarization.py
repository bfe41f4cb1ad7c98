"""Binarization: weights and activations of one bit, or weights of three values."""

import dataclasses
import functools
from typing import ClassVar, Literal

import keras

from keras_compress.algorithms import calibration
from keras_compress.algorithms.base import Algorithm, check_scopes
from keras_compress.algorithms.precision_options import PrecisionInitializer
from keras_compress.algorithms.quantization import Quantization
from keras_compress.algorithms.quantizer_options import (
    QuantizerInitializer,
    QuantizerSpec,
    RangeSpec,
    StagedParams,
)
from keras_compress.algorithms.staging import switch_on
from keras_compress.binary_quantizers import (
    Binarizer,
    BinaryActivations,
    BinaryWeights,
    TernaryWeights,
)
from keras_compress.compressed_layer import layer_spec
from keras_compress.graph.placement import QuantizedEdge
from keras_compress.graph.walk import SEPARATOR, Role, first_layers, last_layers
from keras_compress.layer_specs import CONVOLUTIONS
from keras_compress.options import ConfigError, Flag, number, option
from keras_compress.plan import EdgeEntry, Plan, WeightEntry

BINARIZE = f"{SEPARATOR}binarize"  # ends the name of an edge's binarizer layer
BINARIZED = (*CONVOLUTIONS, keras.layers.Dense)


class BinarizerInitializer(QuantizerInitializer):
    """What happens once, right after binarizers have been placed."""

    precision: PrecisionInitializer = option(
        PrecisionInitializer(),
        "Mixed precision: a width for every quantizer.",
        status="ignored",
        reason="binarizers have one width; that of the rest is chosen in `quantization`",
    )


class Binarization(Algorithm):
    """Binarization of convolutions and dense layers; everything else runs in 8 bits.

    It goes together with `quantization`, which then plans what is not binarized; without that
    algorithm in the configuration a `Quantization()` as it is by default does so.

    The mode `ternary` and the key `binarize_first_and_last` go beyond NNCF's format.

    Example:

    >>> Binarization(mode="dorefa").activation_spec("relu").range.max_percentile
    99.9
    """

    name: ClassVar[str] = "binarization"
    stage: ClassVar[int] = 1

    mode: Literal["xnor", "dorefa", "ternary"] = option(
        "xnor",
        "xnor: one weight scale per filter; dorefa: one per tensor; ternary: weights of three "
        "values per filter, activations of 8 bits. Ternary is an extension.",
    )
    binarize_first_and_last: Flag = option(
        False, "Whether the layers next to inputs and outputs are binarized too. Extension."
    )
    initializer: BinarizerInitializer = option(
        BinarizerInitializer(), "What happens right after binarizers have been placed."
    )
    params: StagedParams = option(StagedParams(), "Staged switch-on.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of scales; the top-level key when not given."
    )

    @property
    def samples_needed(self) -> int:
        """Samples for the widest range estimation or for batch-norm adaptation."""
        return max(self._range_samples, Quantization().samples_needed, self.adaptation_samples)

    @property
    def adaptation_samples(self) -> int:
        """Samples that batch normalization adapts to."""
        return self.initializer.batchnorm_adaptation.num_bn_adaptation_samples

    @property
    def binarizes_activations(self) -> bool:
        """Whether the inputs of the chosen layers are binarized too."""
        return self.mode != "ternary"

    def claims(self, graph):
        """Returns (weights, inputs): names of the layers whose weights and inputs it rounds."""
        names = frozenset(node.name for node in self._chosen(graph))
        return names, names if self.binarizes_activations else frozenset()

    def plan(self, graph, config, with_data):
        """Returns which weights and edges are binarized, with the 8 bits of the rest if need be."""
        self._check_scopes(graph)
        chosen = self._chosen(graph)
        if not chosen:
            raise ConfigError(self._why_nothing(graph))
        decided = Plan(
            graph.name,
            weights=tuple(map(self._weight_entry, chosen)),
            edges=tuple(self._edge_entries(graph, chosen, self.gradient_factor(config))),
            notes=(self._note(graph, chosen),),
        )
        rest = self._rest(config)
        return decided if rest is None else decided.merge(rest.plan(graph, config, with_data))

    def start(self, model, batches) -> None:
        """Sets the scales of activations from `batches` if given, and ranges of the rest."""
        batches = batches and list(batches)
        rest = self._rest(model.config)
        if rest is not None:
            rest.start(model, batches)
        switch_on(self.params, model, 0, (Binarizer,))
        calibration.calibrate_activations(self, model, batches, self._range_samples, Binarizer)

    def update(self, model, step: int, epoch: float | None) -> bool:
        """Without calibration data, reads the scales off the first training batches."""
        rest = self._rest(model.config)
        goes_on = rest is not None and rest.update(model, step, epoch)
        watches = calibration.watch_activations(self, model, self._range_samples, Binarizer)
        return watches or goes_on

    def begin_epoch(self, model, epoch: int) -> None:
        """Switches on what has waited for this epoch."""
        switch_on(self.params, model, epoch, (Binarizer,))

    def finish(self, model) -> None:
        """Makes do with the samples seen when training ended early."""
        rest = self._rest(model.config)
        if rest is not None:
            rest.finish(model)
        calibration.set_activation_ranges(model, Binarizer)

    def statistics(self, model) -> dict[str, float]:
        """Returns the number of binarized weights and tensors; that of all where it plans all."""
        binarizers = [each for each in model.quantizers() if isinstance(each, Binarizer)]
        tensors = sum(isinstance(each, BinaryActivations) for each in binarizers)
        rest = self._rest(model.config)
        figures = {} if rest is None else rest.statistics(model)
        return figures | {
            "binarized_weights": len(binarizers) - tensors,
            "binarized_activations": tensors,
        }

    def activation_spec(self, edge_name: str) -> QuantizerSpec:
        """Returns how the scale of the binarizer on an edge is estimated.

        Where the configuration names no estimator, it is the smallest of the top 0.1 % of the
        values.
        """
        chosen = (e for e in self.initializer.ranges if e.covers("activations", edge_name))
        spec = next((entry.spec() for entry in chosen), RangeSpec())
        if spec.type is None:
            spec = dataclasses.replace(spec, type="percentile")
        return QuantizerSpec("symmetric", 1, False, False, spec)

    @property
    def _range_samples(self):
        counts = [entry.num_init_samples for entry in self.initializer.ranges]
        return max(counts, default=RangeSpec().num_init_samples)

    def _rest(self, config):
        """Returns the `Quantization` of what is not binarized; None where the user has one."""
        given = any(isinstance(algorithm, Quantization) for algorithm in config.algorithms)
        return None if given else Quantization()

    def _chosen(self, graph):
        """Returns the first node of every layer that is binarized."""
        reasons = self._reasons(graph)
        return [node for node in graph.layer_nodes().values() if not reasons.get(node.name, "no")]

    def _reasons(self, graph):
        """Returns {name of a weighted layer: why it is not binarized}, empty where it is."""
        first, last = first_layers(graph), last_layers(graph)
        return {
            node.name: self._why_not(node, first, last)
            for node in graph.layer_nodes().values()
            if node.role is Role.WEIGHTED
        }

    def _why_not(self, node, first, last):
        if not isinstance(node.op, BINARIZED) or not node.is_integer_product:
            return "only convolutions and dense layers are binarized"
        if not self.selects(node.name):
            return "excluded by the scopes of the configuration"
        if not self.binarize_first_and_last:
            if node.name in first:
                return "the first layer behind an input"
            if node.name in last:
                return "the last layer before an output"
        return ""

    def _weight_entry(self, node):
        (weight,) = layer_spec(node.op).weights
        axis = layer_spec(node.op).channel_axes(node.op, weight, is_integer_product=True)
        kind = TernaryWeights if self.mode == "ternary" else BinaryWeights
        axis = None if self.mode == "dorefa" else axis
        make = functools.partial(kind, axis=axis, staged=self.params.stages("weights"))
        width = "ternary" if kind is TernaryWeights else "binary"
        text = f"{width}, one scale per {'tensor' if axis is None else 'filter'}"
        return WeightEntry(node.name, weight, (make,), text)

    def _edge_entries(self, graph, chosen, factor):
        """Yields one `EdgeEntry` per tensor that layers chosen read."""
        if not self.binarizes_activations:
            return
        names = {node.name for node in chosen}
        readers = {}
        for node in graph.nodes:
            if node.name in names:
                readers.setdefault(node.inputs[0], set()).add((node, node.inputs[0]))
        staged = self.params.stages("activations")
        make = functools.partial(BinaryActivations, lr_multiplier=factor, staged=staged)
        for edge, pairs in readers.items():
            group = QuantizedEdge((edge,), frozenset(pairs))
            yield EdgeEntry(edge.name + BINARIZE, group, make, "binary, one scale per tensor")

    def _note(self, graph, chosen):
        kept = [
            f"{name} ({reason})"
            for name, reason in self._reasons(graph).items()
            if reason.startswith("the ")
        ]
        what = "have ternary weights" if self.mode == "ternary" else "are binarized"
        note = f"{len(chosen)} layers {what}; everything else stays with quantization."
        return f"{note} Left to it by default: {', '.join(kept)}." if kept else note

    def _why_nothing(self, graph):
        reasons = [f"'{name}': {reason}" for name, reason in self._reasons(graph).items()]
        return (
            "Expected a model with layers that can be binarized, and scopes (`ignored_scopes`, "
            f"`target_scopes`) that leave some. Received: model '{graph.name}' "
            f"with {len(reasons)} layers with weights, none of which is chosen "
            f"({'; '.join(reasons) or 'there is none'})."
        )

    def _check_scopes(self, graph):
        if not self.validate_scopes:
            return
        weighted = [node.name for node in graph.nodes if node.role is Role.WEIGHTED]
        tensors = [edge.name for edge in graph.edges]
        names = {"weights": weighted, "activations": tensors, None: weighted + tensors}
        check_scopes(self.scope_lists(), weighted)
        for entry in self.initializer.ranges:
            entries = entry.scope_lists("initializer.range.")
            check_scopes(entries, names[entry.target_quantizer_group])
