"""Batch-norm adaptation: fit the moving statistics to the compressed model, nothing else."""

import keras
import numpy as np

from keras_compress.data import input_batches
from keras_compress.graph.trace import accepts_training, trace


def adapt_batch_norm(model, data, samples=2000):
    """Compute the moving statistics of every batch normalization anew, in place.

    For a model whose other layers have changed: pruned, rounded, or with other weights. Nothing
    but moving statistics changes; dropout stays off, frozen layers stay as they are. See
    `adapt_to_batches` for the formula.

    Args:
        model: any built Keras model: plain, compressed or stripped.
        data: samples, labelled or not: `tf.data.Dataset`, `keras.utils.PyDataset`, NumPy arrays or
            a generator of batches.
        samples: how many to run, rounded up to whole batches.

    Raises:
        ValueError: the model is not built, `data` has no sample or does not fit it, or `samples` is
            less than 1.

    Example:

    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, keras.layers.BatchNormalization()(inputs))
    >>> adapt_batch_norm(model, np.array([[1.0, 2.0], [3.0, 6.0]], "float32"))
    >>> model.layers[-1].moving_mean.numpy()
    array([2., 4.], dtype=float32)
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"Expected a number of samples of at least 1. Received: {samples=}")
    batches = list(input_batches(data, trace(model).inputs, samples))  # checked before any is run
    adapt_to_batches(model, batches)


def adapt_to_batches(model, batches):
    """Replace the moving statistics of every batch normalization by those of `batches`.

    Each layer's `moving_mean` and `moving_variance` become the plain average of its batch
    statistics: at call k (from 0) the momentum is `k / (k + 1)`. Only batch normalization runs in
    training mode, so dropout stays off and no other variable changes.

    Args:
        model: a Keras model.
        batches: iterable of flat lists of input arrays, batch axis first.
    """
    graph = trace(model)
    layers = [
        node.op
        for node in graph.layer_nodes().values()
        if isinstance(node.op, keras.layers.BatchNormalization) and node.op.trainable
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    calls = dict.fromkeys(layers, 0)  # a shared layer is called more than once per batch

    def call(node, *args, **kwargs):
        adapts = node.op in calls
        if adapts:
            node.op.momentum = calls[node.op] / (calls[node.op] + 1)
            calls[node.op] += 1
        flag = {"training": adapts} if accepts_training(node.op) else {}
        return node.op(*args, **(kwargs | flag))

    try:
        for inputs in batches:
            tensors = [keras.ops.convert_to_tensor(np.asarray(array)) for array in inputs]
            graph.run(tensors, call)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
