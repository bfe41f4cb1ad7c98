"""Training loops without `fit`: docs/custom_loops.md shows them, test_stepping.py runs them.

Each trains a compiled model on batches `(x, y)` and returns the loss of every step.
"""

import keras

import keras_compress as kc


# --8<-- [start:train_on_batch]
def train_on_batch(model, batches, steps_per_epoch=None):
    """Train by Keras' own step: on every backend, compiled as `compile` says."""
    losses = []
    step = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    for x, y in batches:
        kc.step(model, step, steps_per_epoch)
        losses.append(float(model.train_on_batch(x, y)))
        step += 1
    kc.finish(model, step)
    return losses


# --8<-- [end:train_on_batch]


# --8<-- [start:tensorflow]
def train_tensorflow(model, batches, steps_per_epoch=None):
    """Train by a gradient tape inside of a `tf.function`."""
    import tensorflow as tf

    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    compiled_step = tf.function(train_step)
    losses = []
    step = int(model.optimizer.iterations)
    for x, y in batches:
        eager = kc.step(model, step, steps_per_epoch)
        loss = train_step(x, y) if eager else compiled_step(x, y)
        losses.append(float(loss))
        step += 1
    kc.finish(model, step)
    return losses


# --8<-- [end:tensorflow]


# --8<-- [start:jax]
def train_jax(model, batches, steps_per_epoch=None):
    """Train by a pure function of the state, compiled by `jax.jit`."""
    import jax

    def loss_and_updates(trainable, non_trainable, x, y):
        y_pred, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        metrics = [variable.value for variable in model.metrics_variables]
        loss, (_, non_trainable, _) = model.stateless_compute_loss(
            trainable, non_trainable, metrics, x=x, y=y, y_pred=y_pred
        )
        return loss, non_trainable

    def train_step(state, x, y):
        trainable, non_trainable, slots = state
        (loss, non_trainable), gradients = jax.value_and_grad(loss_and_updates, has_aux=True)(
            trainable, non_trainable, x, y
        )
        trainable, slots = model.optimizer.stateless_apply(slots, gradients, trainable)
        return loss, (trainable, non_trainable, slots)

    def variables():
        return model.trainable_variables, model.non_trainable_variables, model.optimizer.variables

    def read():
        return tuple([variable.value for variable in part] for part in variables())

    def write(state):
        for part, values in zip(variables(), state, strict=True):
            for variable, value in zip(part, values, strict=True):
                variable.assign(value)

    compiled_step = jax.jit(train_step)
    model.optimizer.build(model.trainable_variables)
    losses = []
    step = int(model.optimizer.iterations.value)
    state = read()
    for x, y in batches:
        write(state)  # `step` reads the weights from the model
        eager = kc.step(model, step, steps_per_epoch)
        state = read()  # and sets masks and ranges there
        loss, state = train_step(state, x, y) if eager else compiled_step(state, x, y)
        losses.append(float(loss))
        step += 1
    write(state)
    kc.finish(model, step)
    return losses


# --8<-- [end:jax]


# --8<-- [start:torch]
def train_torch(model, batches, steps_per_epoch=None):
    """Train by `loss.backward()`."""
    import torch

    losses = []
    step = int(model.optimizer.iterations.value)
    for x, y in batches:
        kc.step(model, step, steps_per_epoch)
        model.zero_grad()
        loss = model.compute_loss(x, y, model(x, training=True))
        loss.backward()
        gradients = [variable.value.grad for variable in model.trainable_variables]
        with torch.no_grad():
            model.optimizer.apply(gradients, model.trainable_variables)
        losses.append(float(loss.detach()))
        step += 1
    kc.finish(model, step)
    return losses


# --8<-- [end:torch]

OF_BACKEND = {"tensorflow": train_tensorflow, "jax": train_jax, "torch": train_torch}
