"""Batch-norm adaptation: fit the moving statistics to the compressed model, nothing else."""

import keras
import numpy as np

from keras_compress.graph.trace import trace


def adapt_batch_norm(model, batches):
    """Replace the moving statistics of every batch normalization by those of `batches`.

    Each layer's `moving_mean` and `moving_variance` become the plain average of its batch
    statistics: at batch k (from 0) the momentum is `k / (k + 1)`. Only batch normalization runs in
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

    def call(node, *args, **kwargs):
        if isinstance(node.op, keras.layers.Layer):
            accepts = "training" in node.op._call_context_args
            flag = {"training": node.op in layers} if accepts else {}
            return node.op(*args, **(kwargs | flag))
        return node.op(*args, **kwargs)

    try:
        for count, inputs in enumerate(batches):
            for layer in layers:
                layer.momentum = count / (count + 1)
            tensors = [keras.ops.convert_to_tensor(np.asarray(array)) for array in inputs]
            graph.run(tensors, call)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
