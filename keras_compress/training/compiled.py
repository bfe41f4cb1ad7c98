"""How the user's model was compiled: for models made from it, and for the clock of a training."""

import warnings

import keras


def has_loss(model):
    """Whether a model was compiled with a loss."""
    return getattr(model, "compiled", False) and getattr(model, "loss", None) is not None


def compile_arguments(model, purpose, otherwise):
    """Return the arguments that compile another model alike, with a fresh copy of the optimizer.

    Args:
        model: the user's model.
        purpose: what needs it, for the message: "`key` 'value'".
        otherwise: the sentence of what else can be done.

    Raises:
        ValueError: the model is not compiled with a loss.
    """
    if not has_loss(model):
        raise ValueError(
            f"Expected a model that was compiled with a loss, for {purpose}: "
            "`model.compile(optimizer, loss)` before `compress_model`. "
            f"Received: model '{model.name}' without. {otherwise}"
        )
    with warnings.catch_warnings():  # about losses that are lambdas, which are not stored here
        warnings.simplefilter("ignore")
        loss_weights = model.get_compile_config().get("loss_weights")
    return {
        "optimizer": type(model.optimizer).from_config(model.optimizer.get_config()),
        "loss": model.loss,
        "loss_weights": loss_weights,
        "run_eagerly": model.run_eagerly,
        "jit_compile": model.jit_compile,
    }


def batches_per_update(optimizer):
    """Return how many batches an optimizer sums up gradients of before it changes a weight."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "gradient_accumulation_steps", None) or 1


def batches_done(optimizer):
    """Return how many batches an optimizer has taken up, an int.

    It is `optimizer.iterations` but for gradient accumulation, where that counts updates. A batch
    whose gradients a `LossScaleOptimizer` threw away does not count. Keras saves the number with
    the optimizer.
    """
    if batches_per_update(optimizer) == 1:
        clock = optimizer.iterations
    else:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        clock = next(variable for variable in inner.variables if variable.name == "iteration")
    return int(keras.ops.convert_to_numpy(clock))


class EpochLength:
    """Counts the batches of an epoch of `fit` whose number is not known before.

    The optimizer's clock leaves out batches that loss scaling threw away. With
    `steps_per_execution`, the first batch of the last group is all that is known of its place.

    Args:
        optimizer: the optimizer, when the epoch begins.
    """

    def __init__(self, optimizer):
        self._first = batches_done(optimizer)
        self._group = self._last_group = 0

    def group_begins(self, batch):
        """Note the first batch of a group; Keras also begins one that the data do not have."""
        self._group = batch

    def group_ends(self):
        """Note that the group was there."""
        self._last_group = self._group

    def batches(self, optimizer):
        """Return how many batches the epoch had, at its end."""
        return max(batches_done(optimizer) - self._first, self._last_group + 1)


def built_optimizer(model):
    """Return the optimizer of a compiled model, with a state for each of its trained variables.

    It is built once: a `LossScaleOptimizer` would lose its scale when it is built again.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model.optimizer
