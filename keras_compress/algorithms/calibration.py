"""Initial ranges: of weights from the weights, of activations from the first samples seen."""

import contextlib

import keras

from keras_compress.binary_quantizers import Binarizer
from keras_compress.graph.walk import SEPARATOR, all_layers
from keras_compress.layers import CompressedLayer, FakeQuantize
from keras_compress.quantizers import UniformQuantizer
from keras_compress.ranges import Observer


def calibrate_weights(options, model):
    """Set the range of every weight quantizer with equal steps from the weight that reaches it."""
    for layer in model.layers:
        if isinstance(layer, CompressedLayer) and not _binarizes(layer):
            spec = options.weight_spec(layer.name).range
            layer.initialize_ranges(make_observer(spec), force=True)


def _binarizes(layer):
    transforms = (each for name in layer.weight_names for each in layer.transforms_of(name))
    return any(isinstance(transform, Binarizer) for transform in transforms)


def calibrate_activations(options, model, batches, samples, kind=UniformQuantizer):
    """Set the range of every activation quantizer of a kind from batches; without any, not yet.

    Args:
        options: the algorithm, whose `activation_spec` says how ranges are estimated.
        model: the compressed model.
        batches: flat lists of input arrays, or None.
        samples: how many to run.
        kind: class of the quantizers.
    """
    if batches is None:
        return
    observe_activations(options, model, kind)
    run(model, batches, samples)
    set_activation_ranges(model, kind)


def watch_activations(options, model, samples, kind=UniformQuantizer):
    """Set the ranges that are missing once training has shown enough samples.

    Called after every step, with arguments as for `calibrate_activations`.

    Returns whether quantizers are still observing.
    """
    seen = samples_seen(model, kind)
    if seen is None:
        observe_activations(options, model, kind, training_only=True)
    elif seen >= samples:
        set_activation_ranges(model, kind)
    return samples_seen(model, kind) is not None


def observe_activations(options, model, kind=UniformQuantizer, training_only=False):
    """Make every activation quantizer of a kind without a range collect statistics, not round."""
    for layer in _uncalibrated(model, kind):
        edge, _, _ = layer.name.rpartition(SEPARATOR)
        spec = options.activation_spec(edge).range
        layer.quantizer.observer = make_observer(spec)(layer.quantizer)
        layer.quantizer.observes_training_only = training_only


def samples_seen(model, kind=UniformQuantizer):
    """Return how many samples every observing quantizer has seen at least, or None if none is."""
    counts = [layer.quantizer.observer.samples for layer in _observing(model, kind)]
    return min(counts) if counts else None


def set_activation_ranges(model, kind=UniformQuantizer):
    """Turn collected statistics into ranges and start rounding."""
    for layer in _observing(model, kind):
        quantizer = layer.quantizer
        if quantizer.observer.samples:
            quantizer.set_range(*quantizer.observer.result())
        quantizer.observer = None


def run(model, batches, samples):
    """Call the model in inference mode on batches (flat lists of input arrays).

    Nothing is binarized meanwhile: batch norms are adapted to that afterwards only, and from there
    on the values are closer to those of the float model again.
    """
    seen = 0
    with _nothing_binarized(model):
        for inputs in batches:
            if seen >= samples:
                break
            seen += len(inputs[0])
            tensors = [keras.ops.convert_to_tensor(array) for array in inputs]
            model(keras.tree.pack_sequence_as(model.input, tensors), training=False)


class _Blind:
    """Stands in for an `Observer`: what has one rounds nothing."""

    def update(self, batch):
        """Do nothing."""


@contextlib.contextmanager
def _nothing_binarized(model):
    binarizers = (layer for layer in all_layers(model) if isinstance(layer, Binarizer))
    rounding = [binarizer for binarizer in binarizers if binarizer.observer is None]
    for binarizer in rounding:
        binarizer.observer = _Blind()
    try:
        yield
    finally:
        for binarizer in rounding:
            binarizer.observer = None


def make_observer(spec):
    """Return a function of a quantizer that makes the `Observer` that a `RangeSpec` asks for."""

    def make(quantizer):
        percentiles = spec.min_percentile, spec.max_percentile
        kind = spec.estimator(quantizer.bits)
        return Observer(kind, quantizer.axis, *percentiles, quantizer.grid, quantizer.path)

    return make


def _observing(model, kind):
    return [layer for layer in _layers(model, kind) if layer.quantizer.observer is not None]


def _uncalibrated(model, kind):
    return [layer for layer in _layers(model, kind) if not layer.quantizer.calibrated]


def _layers(model, kind):
    layers = (layer for layer in model.layers if isinstance(layer, FakeQuantize))
    return [layer for layer in layers if isinstance(layer.quantizer, kind)]
