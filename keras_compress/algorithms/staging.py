"""Staged quantization: quantizers that are switched on in the course of training."""

from keras_compress.compressed_layer import CompressedLayer
from keras_compress.layers import FakeQuantize
from keras_compress.quantizers import Quantizer


def switch_on(params, model, epoch, kinds):
    """Let the quantizers round whose epoch has come.

    Args:
        params: `StagedParams`.
        model: the compressed model.
        epoch: counted from 0.
        kinds: tuple of the quantizer classes that are meant.

    Returns:
        Set of the groups, `"weights"` or `"activations"`, of which one was switched on just now.
    """
    groups = {"weights": _weight_quantizers(model), "activations": activation_quantizers(model)}
    switched = set()
    for group, quantizers in groups.items():
        if epoch < params.start_epoch(group):
            continue
        waiting = [q for q in quantizers if isinstance(q, kinds) and not q.is_on]
        for quantizer in waiting:
            quantizer.enable()
            switched.add(group)
    return switched


def activation_quantizers(model):
    """Return the quantizers on the edges of a model."""
    return [layer.quantizer for layer in model.layers if isinstance(layer, FakeQuantize)]


def _weight_quantizers(model):
    layers = [layer for layer in model.layers if isinstance(layer, CompressedLayer)]
    names = ((layer, weight) for layer in layers for weight in layer.weight_names)
    transforms = [each for layer, weight in names for each in layer.transforms_of(weight)]
    return [transform for transform in transforms if isinstance(transform, Quantizer)]
