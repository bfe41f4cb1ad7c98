"""What the tests need of the running Keras backend and Keras itself does not offer."""

import importlib
import pathlib
import sys

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def benchmark_module(name):
    """Return a module of the folder `benchmarks`, which is no package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


one_step_per_execution = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras refuses steps_per_execution other than 1 on torch"
)


def numpy(tensor):
    """Return a tensor as a NumPy array."""
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def value_and_gradients(function, arrays, upstream):
    """Return `function(*arrays)` and the gradients of `sum(upstream * function(*arrays))`.

    All in NumPy; an array that does not matter has the gradient zero.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        inputs = [tf.constant(a) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
        gradients = tape.gradient(value, inputs, tf.constant(upstream), "zero")
    elif BACKEND == "jax":
        import jax

        inputs = [jax.numpy.asarray(a) for a in arrays]
        value, pullback = jax.vjp(function, *inputs)
        gradients = pullback(jax.numpy.asarray(upstream))
    else:
        import torch

        inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
        value = function(*inputs)
        gradients = torch.autograd.grad(
            value, inputs, torch.tensor(upstream), allow_unused=True, materialize_grads=True
        )
    return numpy(value), [numpy(gradient) for gradient in gradients]


def layer_gradients(layer, x, upstream):
    """Return a layer's value on x and the gradients for x and its trainable variables, in NumPy."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        inputs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = layer(inputs, training=True)
        sources = [inputs, *(v.value for v in layer.trainable_variables)]
        gradients = tape.gradient(value, sources, tf.constant(upstream))
        return numpy(value), [numpy(gradient) for gradient in gradients]
    if BACKEND == "torch":
        import torch

        inputs = torch.tensor(x, requires_grad=True)
        value = layer(inputs, training=True)
        sources = [inputs, *(v.value for v in layer.trainable_variables)]
        gradients = torch.autograd.grad(value, sources, torch.tensor(upstream))
        return numpy(value), [numpy(gradient) for gradient in gradients]
    fixed = [v.value for v in layer.non_trainable_variables]

    def call(x, *trained):
        return layer.stateless_call(list(trained), fixed, x, training=True)[0]

    return value_and_gradients(call, [x, *(numpy(v) for v in layer.trainable_variables)], upstream)
