"""Figures and histograms of a compressed model, for the logs of its training."""

import math

import keras
import numpy as np

from keras_compress.algorithms import FilterPruning, Quantization
from keras_compress.algorithms.pruning_plan import kept_by_masks
from keras_compress.algorithms.weight_sparsity import WeightSparsity
from keras_compress.compressed_layer import CompressedLayer, is_weighted, layer_spec
from keras_compress.graph.walk import all_layers
from keras_compress.layers import FakeQuantize
from keras_compress.model_facts import quantizers_of
from keras_compress.quantizers import FLOAT_BITS, Quantizer
from keras_compress.stepping import algorithms_of


def figures(model, per_layer):
    """Return {key: number} of everything that `callbacks.Statistics` adds to the logs.

    Args:
        model: the compressed model.
        per_layer: whether every quantizer and every group of channels has a figure.
    """
    found = {}
    for algorithm in algorithms_of(model):
        found |= algorithm.statistics(model)
        if algorithm.adjustable:
            found[f"level/{algorithm.name}"] = algorithm.rate(model)
        if isinstance(algorithm, (Quantization, WeightSparsity)):  # they need no batch for it
            loss = algorithm.loss(model, None, None)
            if loss is not None:
                found[f"loss/{algorithm.name}"] = keras.ops.convert_to_numpy(loss)
        if per_layer and isinstance(algorithm, FilterPruning):
            levels = _levels(model, algorithm)
            found |= {f"pruning_level/{group}": level for group, level in levels.items()}
    if quantizers_of(model):
        found["mean_weight_bits"] = _mean_weight_bits(model)
    for name, quantizer in _named_quantizers(model) if per_layer else ():
        found[f"range/{name}"] = np.mean(_range(quantizer))
    return found


def _levels(model, pruning):
    """Return {group of channels that may go: fraction of them that is off or removed}."""
    prunable = pruning.prunable(model)
    keep = kept_by_masks(prunable.graph, prunable.coupling)
    left = {group.name: int(keep[group.channels].sum()) for group in prunable.coupling.groups}
    groups = [group for group in model.plan["groups"] if not group["reason"]]
    return {group["name"]: 1 - left[group["name"]] / group["channels"] for group in groups}


def _mean_weight_bits(model):
    sizes = {}  # id of a weight: (size, bits)
    for layer in filter(is_weighted, all_layers(model)):
        spec = layer_spec(layer)
        for name in spec.weights:
            compressed = isinstance(layer, CompressedLayer)
            transforms = layer.transforms_of(name) if compressed else ()
            weight = layer.raw_weight(name) if compressed else spec.read(layer, name)
            widths = [
                each.bits for each in transforms if isinstance(each, Quantizer) and each.is_on
            ]
            sizes[id(weight)] = math.prod(weight.shape), min(widths, default=FLOAT_BITS)
    total = sum(size for size, _ in sizes.values())
    return sum(size * bits for size, bits in sizes.values()) / max(total, 1)


def _transformed_weights(model):
    """Yield (layer, weight, its transforms) of every weight that has any."""
    for layer in model.layers:
        for weight in layer.weight_names if isinstance(layer, CompressedLayer) else ():
            if layer.transforms_of(weight):
                yield layer, weight, layer.transforms_of(weight)


def _named_quantizers(model):
    """Yield (name, quantizer): of the weights, then of the edges."""
    for layer, weight, transforms in _transformed_weights(model):
        for transform in transforms:
            if isinstance(transform, Quantizer):
                yield f"{layer.name}/{weight}", transform
    for layer in model.layers:
        if isinstance(layer, FakeQuantize):
            yield layer.name, layer.quantizer


def _range(quantizer):
    """Return the length of a quantizer's range, per channel; NaN where it has none yet."""
    if not quantizer.calibrated:
        return np.array([math.nan])
    low, high = quantizer.effective_range()
    return np.ravel(high - low)


def histograms(model):
    """Yield (tag, array of values) of everything that `callbacks.Statistics` writes."""
    for layer, weight, transforms in _transformed_weights(model):
        name = f"{layer.name}/{weight}"
        raw = keras.ops.convert_to_numpy(layer.raw_weight(weight))
        yield f"raw_weight/{name}", raw
        yield f"effective_weight/{name}", layer.effective_weight(weight)
        masks = [each for each in transforms if not isinstance(each, Quantizer)]
        if masks:
            on = keras.ops.ones(raw.shape)
            for mask in masks:
                on = mask(on, training=False)
            on = keras.ops.convert_to_numpy(on)
            yield f"mask_density/{name}", on.mean(axis=tuple(range(on.ndim - 1)))
    for name, quantizer in _named_quantizers(model):
        if quantizer.calibrated:
            yield f"range/{name}", _range(quantizer)
