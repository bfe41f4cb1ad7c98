"""A case of every layer class with a row, and what the tests of the layer classes share."""

import numpy as np
from backend_helpers import BACKEND, numpy
from keras import layers

# Keras class -> (constructor arguments, input shape)
CASES = {
    layers.Conv1D: ({"filters": 4, "kernel_size": 3}, (2, 8, 3)),
    layers.Conv2D: ({"filters": 4, "kernel_size": 3, "activation": "relu"}, (2, 6, 6, 3)),
    layers.Conv3D: ({"filters": 4, "kernel_size": 2}, (2, 4, 4, 4, 3)),
    layers.Conv1DTranspose: ({"filters": 4, "kernel_size": 3}, (2, 8, 3)),
    layers.Conv2DTranspose: ({"filters": 4, "kernel_size": 3, "strides": 2}, (2, 6, 6, 3)),
    layers.Conv3DTranspose: ({"filters": 4, "kernel_size": 2}, (2, 4, 4, 4, 3)),
    layers.DepthwiseConv1D: ({"kernel_size": 3, "depth_multiplier": 2}, (2, 8, 3)),
    layers.DepthwiseConv2D: ({"kernel_size": 3, "depth_multiplier": 2}, (2, 6, 6, 3)),
    layers.SeparableConv1D: ({"filters": 4, "kernel_size": 3}, (2, 8, 3)),
    layers.SeparableConv2D: ({"filters": 4, "kernel_size": 3, "strides": 2}, (2, 6, 6, 3)),
    layers.Dense: ({"units": 4, "use_bias": False}, (2, 5)),
    layers.EinsumDense: (
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        (2, 4, 5),
    ),
    layers.Embedding: ({"input_dim": 7, "output_dim": 4}, (2, 5)),
    layers.ReversibleEmbedding: ({"input_dim": 7, "output_dim": 4}, (2, 5)),
    layers.SimpleRNN: ({"units": 3, "return_sequences": True}, (2, 4, 5)),
    layers.GRU: ({"units": 3, "go_backwards": True}, (2, 4, 5)),
    layers.LSTM: ({"units": 3, "return_sequences": True}, (2, 4, 5)),
    layers.BatchNormalization: ({}, (2, 6, 6, 3)),
    layers.LayerNormalization: ({}, (2, 6, 4)),
    layers.GroupNormalization: ({"groups": 2}, (2, 3, 3, 6)),
    layers.RMSNormalization: ({}, (2, 6, 4)),
}


def data(cls, seed=0):
    random = np.random.default_rng(seed)
    shape = CASES[cls][1]
    if issubclass(cls, layers.Embedding):
        return random.integers(0, 7, shape).astype("int32")
    return random.normal(size=shape).astype("float32")


def plain_twin(layer):
    plain = layer.keras_class(**CASES[layer.keras_class][0], dtype=layer.dtype_policy)
    plain.build(CASES[layer.keras_class][1])
    plain.set_weights(layer.plain_values())
    return plain


def weight_gradients(layer, x):
    """Return the gradients of `sum(layer(x))` for the trainable variables, in NumPy."""
    if BACKEND == "jax":
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]  # seeds of recurrent layers

        def total(trained):
            return layer.stateless_call(trained, fixed, x)[0].sum()

        return [numpy(g) for g in jax.grad(total)([v.value for v in layer.trainable_variables])]
    if BACKEND == "torch":
        import torch

        sources = [v.value for v in layer.trainable_variables]
        return [numpy(g) for g in torch.autograd.grad(layer(x).sum(), sources)]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = tf.reduce_sum(layer(x))
    return [numpy(g) for g in tape.gradient(value, [v.value for v in layer.trainable_variables])]
