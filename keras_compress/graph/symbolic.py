"""One call of a layer or operation on symbolic tensors, recorded.

Symbolic tensors stand for the edges that a call is given. They carry the implicit masks that Keras
would pass on beside the tensors (`Embedding(mask_zero=True)`, `Masking`), as tensors too.
"""

import contextlib
import dataclasses
import inspect
import types

import keras

from keras_compress.graph.decompose import attention, unwrapped
from keras_compress.graph.record import (
    SIZES,
    Record,
    Untraceable,
    definite_sizes,
    described,
    opening,
    unique_names,
    with_unknown_batch,
)
from keras_compress.graph.traced_layers import CausalMask
from keras_compress.graph.walk import Edge

ATTENTION_LAYERS = tuple(
    getattr(keras.layers, name)
    for name in ("MultiHeadAttention", "GroupQueryAttention")
    if hasattr(keras.layers, name)
)


def call_symbolically(op, args, kwargs, opened=types.MappingProxyType({})):
    """Return (`Record` of `op.call`, ""), or (None, reason); training may change no node."""
    unknown = any(map(_batch_is_unknown, keras.tree.flatten([args, kwargs])))
    try:
        try:
            record = _in_both_modes(op, args, kwargs, None, opened)
        except Exception:  # whatever a user's `call` may raise on a batch of unknown size
            if not unknown:
                raise
            record = None
        if unknown and (record is None or record.needs_batch_size()):
            records = [_in_both_modes(op, args, kwargs, size, opened) for size in SIZES]
            record = with_unknown_batch(*records)
    except Untraceable as error:
        return None, str(error)
    except Exception as error:  # whatever it may raise on symbolic tensors
        line = str(error).strip().splitlines() or [""]
        return None, f"cannot be traced ({type(error).__name__}: {line[0][:120]})"
    if record.holds_variable():
        return None, "uses variables outside of a layer"
    return record, ""


def _batch_is_unknown(leaf):
    return isinstance(leaf, Edge) and leaf.shape[:1] == (None,)


def _in_both_modes(op, args, kwargs, batch, opened):
    """Return the `Record` of `op.call`, unless it does other things in training."""

    def record(**training):
        return _record(op, args, kwargs | training, batch, opened)

    parameters = inspect.signature(op.call).parameters
    if "training" not in parameters:
        return record()
    if described(record(training=True)) != described(record(training=False)):
        raise Untraceable("runs other operations in training than in inference")
    if "training" in inspect.signature(op.call).bind(*args, **kwargs).arguments:
        return record()
    # A default of False is no decision: inner layers are to follow the outer model.
    return record(training=parameters["training"].default is True or None)


def _symbolic(args, kwargs, batch=None):
    """Return (list of symbolic tensors, args, kwargs) with those in place of edges.

    The tensors of the implicit masks follow those of the edges, in the same order.
    """

    def fresh(shape, dtype):
        if shape[:1] == (None,):
            shape = (batch, *shape[1:])
        return keras.Input(batch_shape=shape, dtype=dtype)

    def stand_in(leaf):
        if not isinstance(leaf, Edge):
            return leaf
        tensor = fresh(leaf.shape, leaf.dtype)
        if leaf.mask is not None:
            tensor._keras_mask = fresh(leaf.mask, "bool")
        return tensor

    args, kwargs = keras.tree.map_structure(stand_in, (list(args), dict(kwargs)))
    tensors = _tensors([args, kwargs])
    return [*tensors, *(t._keras_mask for t in tensors if _mask(t) is not None)], args, kwargs


def edges_in(args, kwargs):
    """Return the edges among the arguments of a call, in the order of `Record.inputs`."""
    leaves = keras.tree.flatten([list(args), dict(kwargs)])
    return [leaf for leaf in leaves if isinstance(leaf, Edge)]


def _tensors(structure):
    leaves = keras.tree.flatten(structure)
    return [leaf for leaf in leaves if isinstance(leaf, keras.KerasTensor)]


def _mask(tensor):
    """Return the implicit mask of a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def _with_masks(op, args, kwargs):
    """Return the keyword arguments of `op.call` with the masks that `op.__call__` would add."""
    parameters = inspect.signature(op.call).parameters
    given = inspect.signature(op.call).bind(*args, **kwargs).arguments
    tensors = {name: value for name, value in given.items() if _tensors(value)}
    masks = {}
    for name, value in tensors.items():
        argument = "mask" if len(tensors) == 1 else f"{name}_mask"
        if argument in parameters and given.get(argument) is None:
            masks[argument] = keras.tree.map_structure(_mask, value)
    return kwargs | masks


def _set_masks(op, args, kwargs, outputs, previous):
    """Give the outputs of `op.call` the masks that `op.__call__` would give them."""
    if not op.supports_masking:
        return
    if kwargs.get("mask") is not None:
        previous = kwargs["mask"]
    op._set_mask_metadata(_first(args, kwargs), outputs, previous)


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()))


def masks_after(op, args, kwargs):
    """Return what a layer that is kept whole does to implicit masks.

    Returns:
        (list of the shape of the mask, or None, per output; edges that lose their mask).
    """
    edges = edges_in(args, kwargs)
    inputs, args, kwargs = _symbolic(args, kwargs)
    outputs = keras.tree.flatten(op(*args, **kwargs))
    masks = [_mask(tensor) for tensor in outputs]
    lost = [e for e, t in zip(edges, inputs, strict=False) if e.mask and _mask(t) is None]
    return [None if mask is None else tuple(mask.shape) for mask in masks], lost


def _record(op, args, kwargs, batch, opened):
    """Call `op.call` once, on fresh symbolic tensors in place of edges and of its own variables."""
    inputs, args, kwargs = _symbolic(args, kwargs, batch)
    masks = keras.tree.map_structure(_mask, _first(args, kwargs))
    masked = {id(t) for t in inputs if _mask(t) is not None}
    kwargs = _with_masks(op, args, kwargs)
    layers = [layer for layer, _ in opened.values()]
    inner = op._flatten_layers(include_self=False, recursive=True)
    with contextlib.ExitStack() as stack:
        variables = [
            pair
            for layer in [op, *layers]
            for pair in stack.enter_context(_symbolic_variables(layer))
        ]
        for layer in layers:
            stack.enter_context(opening(layer))
        stack.enter_context(unique_names(inner))
        stack.enter_context(definite_sizes(inner))
        stack.enter_context(causal_masks([op, *inner]))
        outputs = op.call(*args, **kwargs)
        _set_masks(op, args, kwargs, outputs, masks)
        record = _function([*inputs, *(t for _, t in variables)], outputs)
    unmasked = [i for i, t in enumerate(inputs) if id(t) in masked and _mask(t) is None]
    paths = {
        id(x): path
        for layer, path in opened.values()
        for x in layer._flatten_layers(include_self=False, recursive=False)
    }
    return dataclasses.replace(
        record, inputs=inputs, variables=variables, paths=paths, unmasked=unmasked
    )


def _function(inputs, outputs):
    """Return the `Record` of what leads from symbolic inputs to outputs and their masks."""
    outputs = keras.tree.flatten(outputs)
    masks = [_mask(tensor) for tensor in outputs]
    record = recorded(keras.Function(inputs, _tensors([*outputs, *masks])))
    return dataclasses.replace(record, outputs=outputs, masks=masks)


@contextlib.contextmanager
def _symbolic_variables(op):
    """Let a layer read symbolic tensors in place of its own variables; gives the pairs of both."""
    own = {id(v): v for v in op._trainable_variables + op._non_trainable_variables}
    held = {name: value for name, value in vars(op).items() if id(value) in own}
    missing = own.keys() - {id(value) for value in held.values()}
    if missing:
        raise Untraceable("has weights of its own that are no attributes")
    pairs = {
        id(v): (v, keras.Input(batch_shape=v.shape, dtype=op.compute_dtype)) for v in held.values()
    }
    vars(op).update({name: pairs[id(value)][1] for name, value in held.items()})
    try:
        yield list(pairs.values())
    finally:
        vars(op).update(held)


def recorded(function):
    """Return a Keras `Function` as a `Record`."""
    calls = [
        (node.operation, node.arguments.args, node.arguments.kwargs, node.outputs)
        for node in _nodes_of(function)
        if not node.is_input
    ]
    return Record(list(function.inputs), keras.tree.flatten(function._outputs_struct), calls)


def mask_is_implicit(args, kwargs):
    """Whether the `mask` among symbolic arguments is the one that their tensors carry anyway."""
    tensors = keras.tree.flatten(list(args))
    masks = keras.tree.flatten(kwargs.get("mask"))
    pairs = zip(tensors, masks, strict=False)
    return len(tensors) == len(masks) and all(_mask(tensor) is mask for tensor, mask in pairs)


def _nodes_of(function):
    """Return the Keras nodes of a `Function` in execution order."""
    depths = sorted(function._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in function._nodes_by_depth[depth]]


def call_unwrapped(op, args, kwargs):
    """Return (`Record` of what a wrapper does with its inner layers or None, reason)."""
    inputs, args, kwargs = _symbolic(args, kwargs)
    mask = kwargs.pop("mask", None)
    if len(args) != 1 or _tensors(kwargs):
        return None, "is given initial states"
    tensor = args[0]
    if mask is not None:
        tensor._keras_mask = mask
    masks = _mask(tensor)
    outputs, reason = unwrapped(op, tensor, _mask(tensor) is not None)
    if reason:
        return None, reason
    _set_masks(op, [tensor], {}, outputs, masks)
    return _function(inputs, outputs), ""


def call_attention(op, args, kwargs):
    """Return the `Record` of an attention's two products."""
    inputs, args, kwargs = _symbolic(args, kwargs)
    return _function(inputs, attention(*args, **kwargs, is_causal=op.is_causal))


@contextlib.contextmanager
def causal_masks(layers):
    """Let the attention layers among these make their causal masks for any length."""

    def causal_mask(query, value=None):
        return CausalMask(name="causal_mask")(query, query if value is None else value)

    layers = [layer for layer in layers if isinstance(layer, ATTENTION_LAYERS)]
    for layer in layers:
        vars(layer)["_compute_causal_mask"] = causal_mask
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["_compute_causal_mask"]
