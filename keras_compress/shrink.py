"""Physical removal of the channels that masks switch off, after training or in its midst."""

import copy

import keras
import numpy as np

from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.compressed_model import CompressedModel
from keras_compress.graph.rebuild import rebuild, take
from keras_compress.graph.trace import trace
from keras_compress.replicas import scope_of
from keras_compress.training.compiled import built_optimizer


def shrink(model, optimizer=None):
    """Return a smaller compressed model, without the channels that masks switch off.

    Weights, masks, ranges of quantizers and, where it is given, the slots of the optimizer are cut
    alike, so that training goes on where it was. The output stays that of `model`, up to the order
    of sums. `keras_compress.strip` does the same and makes the model plain besides.

    Args:
        model: a model made by `compress_model` with filter pruning. It is left untouched.
        optimizer: the optimizer that trains `model`, usually `model.optimizer`: one of Keras' own,
            built. None: the caller will start with a fresh one.

    Returns:
        The uncompiled `CompressedModel`; with `optimizer` the pair of it and a copy of the
        optimizer that fits it, for `compile`.

    Raises:
        TypeError: not a compressed model.
        ValueError: the model has no masks, the masks contradict each other, or the optimizer has
            not been built for the model or keeps state that cannot be cut.

    Example:

    ```python
    small, optimizer = kc.shrink(model, optimizer=model.optimizer)
    small.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    small.fit(train_ds, epochs=10)
    ```
    """
    if not isinstance(model, CompressedModel):
        raise TypeError(
            "Expected a model made by `keras_compress.compress_model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    masked = MaskedGraph.of(trace(model))
    if masked is None:
        raise ValueError(
            "Expected a model with masks, made with `filter_pruning` in its configuration. "
            f"Received: model '{model.name}' without any."
        )
    with scope_of(model):
        return _shrunk(model, masked, optimizer)


def _shrunk(model, masked, optimizer):
    """Return what `shrink` does, from the `MaskedGraph` of the model."""
    if optimizer is not None:
        _require_built(optimizer)
    compression = copy.deepcopy(model.get_config()["compression"])
    narrowing = masked.narrowing
    for algorithm in model.config.algorithms:
        algorithm.cut(compression.get("progress", {}), narrowing)
    small = rebuild(
        masked.graph,
        model_class=CompressedModel,
        narrowing=narrowing,
        compression=compression,
        dtype=model.dtype_policy,
    )
    small.take_teacher_of(model)
    if optimizer is None:
        return small
    return small, shrunk_optimizer(optimizer, model, small, variable_cuts(masked))


def shrink_in_place(model):
    """Make a compressed, compiled model itself smaller, between two epochs of `fit`.

    The object stays, its layers are those of `shrink(model)`; losses, metrics and the shortened
    optimizer are kept. Compiled functions are made anew.

    Returns:
        Whether there was anything to remove.
    """
    masked = MaskedGraph.of(trace(model))
    if masked is None or masked.keep.all():
        return False
    before = dict(vars(model))
    compiled_with = model.compiled_with
    small, optimizer = _shrunk(model, masked, built_optimizer(model))
    structure = (small.input, small.output)
    # As new, but for the methods that Keras binds to an object when it is made.
    blank = vars(CompressedModel.__new__(CompressedModel, *structure))
    for name in before:
        if not callable(blank.get(name)):
            del vars(model)[name]
    vars(model).update({k: v for k, v in blank.items() if not callable(v)})
    config = small.get_config()
    given = {"name": before["name"], "compression": config["compression"], "dtype": config["dtype"]}
    CompressedModel.__init__(model, *structure, **given)
    model.compile(**compiled_with | {"optimizer": optimizer})
    for name in before.keys() - vars(model).keys():  # what `fit` keeps while it runs
        setattr(model, name, before[name])
    for name in ("history", "stop_training"):
        if name in before:
            setattr(model, name, before[name])
    model.make_train_function(force=True)
    return True


def _require_built(optimizer):
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.built:
        raise ValueError(
            "Expected an optimizer that has been built for the model, by training it. "
            f"Received: optimizer={optimizer!r} without state. Leave `optimizer` out instead."
        )


def variable_cuts(masked):
    """Return {id of a variable: {axis: positions that stay}} over all layers."""
    cuts = {}
    for name, node in masked.graph.layer_nodes().items():
        if isinstance(node.op, keras.layers.Layer):
            cuts |= masked.narrowing.variables(node.op, name)
    return cuts


def shrunk_optimizer(optimizer, model, small, cuts):
    """Return a copy of an optimizer whose state fits a smaller model.

    Args:
        optimizer: one that has been built for the trainable variables of `model`.
        model: the model before.
        small: the model after, with as many variables in the same order.
        cuts: {id of a variable of `model`: {axis: positions that stay}}.

    Raises:
        ValueError: it keeps state that belongs to no weight of the model.
    """
    config = keras.saving.serialize_keras_object(optimizer)
    twin = keras.saving.deserialize_keras_object(config)
    twin.build(small.trainable_variables)
    if hasattr(optimizer, "inner_optimizer"):
        pairs = [(optimizer.inner_optimizer, twin.inner_optimizer), (optimizer, twin)]
    else:
        pairs = [(optimizer, twin)]
    trained = model.trainable_variables
    slots = {}  # id of a state variable: the cut of the weight that it belongs to
    for old, _ in pairs:
        for states in _slot_lists(old, trained):
            for state, variable in zip(states, trained, strict=True):
                if state is not None:
                    slots[id(state)] = cuts.get(id(variable), {})
    for old, new in zip(optimizer.variables, twin.variables, strict=True):
        value = take(keras.ops.convert_to_numpy(old), slots.get(id(old), {}))
        if value.shape != tuple(new.shape):
            raise ValueError(
                f"{type(optimizer).__name__} keeps a state '{old.path}' of shape {value.shape} "
                "that cannot be cut along with its weight: expected one value for each of the "
                "weight's. Call `shrink` without `optimizer` and compile with a fresh one."
            )
        new.assign(np.asarray(value))
    return twin


def _slot_lists(optimizer, variables):
    """Return the lists of an optimizer that hold one state of its own shape for each variable."""
    return [
        states
        for states in vars(optimizer).values()
        if isinstance(states, (list, tuple))
        and len(states) == len(variables)
        and any(state is not None for state in states)
        and all(
            state is None or tuple(getattr(state, "shape", ())) == tuple(variable.shape)
            for state, variable in zip(states, variables, strict=True)
        )
        and states is not variables
    ]
