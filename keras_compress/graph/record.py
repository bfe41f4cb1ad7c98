"""What one symbolic call of a layer does: a list of calls of inner layers and operations.

A call that asks for the size of its batch cannot be recorded with a batch of unknown size, which
is None there. It is recorded twice, with batches of two sizes: what differs is the batch.
"""

import contextlib
import dataclasses
import functools
import inspect

import keras

from keras_compress.graph.traced_layers import BatchSized, CausalMask

SIZES = (2, 3)  # of the batches of the two records
# Operation -> its attribute that may hold the size of the batch; both are named as in `keras.ops`.
SIZED = {
    "Reshape": ("reshape", "newshape"),
    "Tile": ("tile", "repeats"),
    "BroadcastTo": ("broadcast_to", "shape"),
    "Repeat": ("repeat", "repeats"),
}
# Operations whose result is the same when a constant is not repeated along the batch.
BROADCASTING = (
    "Add Subtract Multiply Divide TrueDivide Minimum Maximum Where LogicalAnd LogicalOr Softmax"
).split()


class Untraceable(Exception):
    """Says why a call has no record."""


@dataclasses.dataclass(eq=False)
class Record:
    """The calls that lead from symbolic `inputs` to `outputs`.

    Attributes:
        inputs, outputs: flat lists of `KerasTensor`s; an output may be a constant.
        calls: tuples (operation, args, kwargs, list of the tensors it gives), in order.
        variables: pairs (variable, tensor that stands for it) of the recorded layer's own.
        paths: {id of an inner layer: path to it}, for those inside of layers that were opened.
        masks: per output, the tensor of its implicit mask or None; None: those of the inner calls.
        unmasked: indices of the inputs that lose their implicit mask in the call.
    """

    inputs: list
    outputs: list
    calls: list
    variables: list = dataclasses.field(default_factory=list)
    paths: dict = dataclasses.field(default_factory=dict)
    masks: list | None = None
    unmasked: list = dataclasses.field(default_factory=list)

    def needs_batch_size(self):
        """Whether an operation was given None for the size of the batch."""
        return any(
            None in keras.tree.flatten(vars(op)[SIZED[type(op).__name__][1]])
            for op, *_ in self.calls
            if type(op).__name__ in SIZED and not isinstance(op, keras.layers.Layer)
        )

    def holds_variable(self):
        """Whether an operation was given a variable as it is, not a tensor that stands for it."""
        leaves = keras.tree.flatten([call[1:3] for call in self.calls])
        return any(isinstance(leaf, keras.Variable) for leaf in leaves)


def with_unknown_batch(first, second):
    """Return the `Record` for any batch, from those for batches of `SIZES`.

    Raises:
        Untraceable: they differ in more than the size of the batch.
    """
    if len(first.calls) != len(second.calls):
        raise Untraceable("does other things for batches of other sizes")
    tensors = {}

    def tensor(a, b):
        if id(a) not in tensors:
            pairs = zip(a.shape, b.shape, strict=True)
            shape = tuple(x if x == y else None for x, y in pairs)
            tensors[id(a)] = keras.KerasTensor(shape, dtype=a.dtype)
        return tensors[id(a)]

    def merged(a, b, op):
        if isinstance(a, keras.KerasTensor):
            return tensor(a, b)
        return _constant(a, b, op) if hasattr(a, "shape") else _same(a, b)

    calls = []
    inputs = [tensor(a, b) for a, b in zip(first.inputs, second.inputs, strict=True)]
    for (op, *given, results), (other, *given_other, results_other) in zip(
        first.calls, second.calls, strict=True
    ):
        args, kwargs = keras.tree.map_structure(
            lambda a, b, op=op: merged(a, b, op), given, given_other
        )
        merged_op = _merged_operation(op, other)
        if merged_op is not op:
            args = [*args, inputs[0]]
        pairs = zip(results, results_other, strict=True)
        calls.append((merged_op, args, kwargs, [tensor(a, b) for a, b in pairs]))
    return Record(
        inputs,
        [merged(a, b, None) for a, b in zip(first.outputs, second.outputs, strict=True)],
        calls,
        [(variable, tensor(t, t)) for variable, t in first.variables],
        first.paths,
        [merged(a, b, None) for a, b in zip(first.masks, second.masks, strict=True)],
        first.unmasked,
    )


def _merged_operation(op, other):
    """Return the operation of both records, a `BatchSized` layer where it knows the batch."""
    if op is other or (isinstance(op, CausalMask) and isinstance(other, CausalMask)):
        return op
    if type(op) is not type(other) or isinstance(op, keras.layers.Layer):
        raise Untraceable("does other things for batches of other sizes")
    settings, others = (
        {k: v for k, v in vars(x).items() if k != "name" and not k.startswith("_")}
        for x in (op, other)
    )
    function, sized = SIZED.get(type(op).__name__, (None, None))
    if sized is None or settings[sized] == others[sized]:
        _same(repr(settings), repr(others))
        return op
    size = keras.tree.map_structure(_batch_or_same, settings.pop(sized), others.pop(sized))
    return BatchSized(function, sized, size, _same(settings, others), name=function)


def _batch_or_same(a, b):
    return None if (a, b) == SIZES else _same(a, b)


def _same(a, b):
    if a is not b and a != b:
        raise Untraceable(f"computes with the size of the batch ({a} for {SIZES[0]} samples)")
    return a


def _constant(a, b, op):
    """Return a tensor made without any input; of one sample where it is repeated for all."""
    x, y = (keras.ops.convert_to_numpy(value) for value in (a, b))
    if x.shape == y.shape and (x == y).all():
        return a
    repeated = (x.shape[:1], y.shape[:1]) == tuple((size,) for size in SIZES) and (
        (x == x[:1]).all() and (y == x[:1]).all()
    )
    if not repeated or type(op).__name__ not in BROADCASTING:
        raise Untraceable("makes tensors of the size of the batch")
    return a[:1]


def described(record):
    """Return what a `Record` does, comparable between two records of the same `call`."""

    def describe(op, args, kwargs, _):
        kwargs = {key: value for key, value in kwargs.items() if key != "training"}
        leaves = keras.tree.flatten([list(args), kwargs])
        constants = [repr(leaf) for leaf in leaves if not isinstance(leaf, keras.KerasTensor)]
        if isinstance(op, CausalMask):  # made in the call
            return CausalMask, constants
        if isinstance(op, keras.layers.Layer):
            return id(op), constants
        settings = {k: v for k, v in vars(op).items() if k != "name" and not k.startswith("_")}
        return type(op), repr(settings), constants

    return [describe(*call) for call in record.calls]


@contextlib.contextmanager
def opening(layer):
    """Let calls of a layer leave its inner calls in the graph in place of its own."""
    cls = type(layer)
    training = inspect.signature(layer.call).parameters.get("training")
    # As elsewhere, a default of False is no decision.
    defaults = {} if training is None or training.default is True else {"training": None}

    def call(self, *args, **kwargs):
        return self.call(*args, **(defaults | kwargs))

    object.__setattr__(layer, "__class__", type(cls.__name__, (cls,), {"__call__": call}))
    try:
        yield
    finally:
        object.__setattr__(layer, "__class__", cls)


@contextlib.contextmanager
def unique_names(layers):
    """Give layers unique names, which a Keras `Function` insists on."""
    names = [layer.name for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.name = f"{layer.name}-{index}"
        yield
    finally:
        for layer, name in zip(layers, names, strict=True):
            layer.name = name


@contextlib.contextmanager
def definite_sizes(layers):
    """Let the `EinsumDense` layers among these report every size that their input has."""

    def output_shape(layer, input_shape):
        given, _, output = layer.equation.replace(" ", "").partition("->")
        sizes = dict(zip(given.split(",")[0], input_shape, strict=True))
        known = keras.layers.EinsumDense.compute_output_shape(layer, input_shape)
        return tuple(sizes.get(label, size) for label, size in zip(output, known, strict=True))

    layers = [
        layer
        for layer in {id(layer): layer for layer in layers}.values()  # one may be called often
        if isinstance(layer, keras.layers.EinsumDense) and "." not in layer.equation
    ]
    for layer in layers:
        vars(layer)["compute_output_shape"] = functools.partial(output_shape, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["compute_output_shape"]
