"""Initial ranges: of weights from the weights, of activations from the first samples seen."""

import keras

from keras_compress.algorithms.quantizer_plan import FAKE_QUANTIZE
from keras_compress.layers import CompressedLayer, FakeQuantize
from keras_compress.ranges import Observer


def calibrate_weights(options, model):
    """Set the range of every weight quantizer from the weight that reaches it."""
    for layer in model.layers:
        if isinstance(layer, CompressedLayer):
            spec = options.weight_spec(layer.name).range
            layer.initialize_ranges(_observer(spec), force=True)


def observe_activations(options, model):
    """Make every activation quantizer without a range collect statistics instead of rounding."""
    for layer in _uncalibrated(model):
        spec = options.activation_spec(layer.name.removesuffix(FAKE_QUANTIZE)).range
        layer.quantizer.observer = _observer(spec)(layer.quantizer.axis)


def samples_seen(model):
    """Return how many samples every observing quantizer has seen at least, or None if none is."""
    counts = [layer.quantizer.observer.samples for layer in _observing(model)]
    return min(counts) if counts else None


def set_activation_ranges(model):
    """Turn collected statistics into ranges and start rounding."""
    for layer in _observing(model):
        quantizer = layer.quantizer
        if quantizer.observer.samples:
            quantizer.set_range(*quantizer.observer.result())
        quantizer.observer = None


def run(model, batches, samples):
    """Call the model in inference mode on batches (flat lists of input arrays)."""
    seen = 0
    for inputs in batches:
        if seen >= samples:
            break
        seen += len(inputs[0])
        tensors = [keras.ops.convert_to_tensor(array) for array in inputs]
        model(keras.tree.pack_sequence_as(model.input, tensors), training=False)


def _observer(spec):
    def make(axis):
        return Observer(spec.type, axis, spec.min_percentile, spec.max_percentile)

    return make


def _observing(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, FakeQuantize) and layer.quantizer.observer is not None
    ]


def _uncalibrated(model):
    return [
        layer
        for layer in model.layers
        if isinstance(layer, FakeQuantize) and not layer.quantizer.calibrated
    ]
