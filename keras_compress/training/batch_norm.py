"""Batch-norm adaptation: fit the moving statistics to the compressed model, nothing else."""

import keras
import numpy as np

from keras_compress.graph.trace import accepts_training, trace


def adapt_batch_norm(model, batches):
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
