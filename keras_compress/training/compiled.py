"""How the user's model was compiled, for models that are made from it and trained or judged."""

import warnings


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
