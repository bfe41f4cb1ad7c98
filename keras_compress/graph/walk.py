"""The read-only graph every algorithm looks at: nodes, edges, and what each operation does.

A `Graph` is a flat list of `Node`s in execution order, joined by `Edge`s (tensors). It knows no
algorithm; `OPS` says, per operation class, how values move through it.
"""

import dataclasses
import enum

import keras

from keras_compress.compressed_layer import is_weighted, layer_spec
from keras_compress.graph.traced_layers import BatchSized, Parameter, SetMask
from keras_compress.layers import FakeQuantize

# Joins the names of nested layers: a name may hold no "/" in Keras and no "." in torch.
SEPARATOR = "-"


def all_layers(model):
    """Return every layer inside a model, at any depth: quantizers of weights and edges too."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def set_path(variable, path):
    """Give a variable a path: what Keras makes of the names of the layers around it."""
    variable._path = path


def copy_operation(op, name):
    """Return a copy of a stateless operation that belongs to no graph yet."""
    twin = object.__new__(type(op))
    vars(twin).update(vars(op))
    twin.name, twin._inbound_nodes, twin._outbound_nodes = name, [], []
    return twin


def unique_name(base, taken, joint="_"):
    """Return `base`, numbered behind `joint` where it is in the set `taken`, and put it there."""
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}{joint}{count}"
    taken.add(name)
    return name


class Role(enum.Enum):
    """What an operation does to the values of its inputs."""

    WEIGHTED = "weighted"  # multiplies by weights: integer arithmetic when inputs are integers
    ARITHMETIC = "arithmetic"  # combines values: its inputs are worth quantizing
    NORMALIZATION = "normalization"  # affine per channel: folds into a convolution before it
    ACTIVATION = "activation"  # element-wise function, fused with the operation before it
    # Only moves or selects values, in integers too: the same grid before and after. (Repetition,
    # reversal and up-sampling move values as well, but the CPU plugin computes them in float.)
    MOVEMENT = "movement"
    FAKE_QUANTIZE = "fake quantize"  # already rounds to a grid
    PARAMETER = "parameter"  # gives a variable, whatever its input
    FLOAT = "float"  # anything else: stays as it is


def _rows(role, prefix, names):
    """Pair each class of the public namespace `prefix` that this Keras version has with `role`."""
    return {getattr(prefix, name): role for name in names.split() if hasattr(prefix, name)}


OPS = {
    **_rows(
        Role.ARITHMETIC,
        keras.layers,
        "Add Subtract Multiply Average Maximum Minimum Dot AveragePooling1D AveragePooling2D "
        "AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D",
    ),
    **_rows(Role.NORMALIZATION, keras.layers, "BatchNormalization"),
    Parameter: Role.PARAMETER,
    SetMask: Role.MOVEMENT,
    **_rows(Role.ACTIVATION, keras.layers, "ReLU LeakyReLU PReLU ELU Activation"),
    **_rows(
        Role.MOVEMENT,
        keras.layers,
        "Reshape Flatten Permute ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D "
        "MaxPooling1D MaxPooling2D MaxPooling3D "
        "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D Concatenate Dropout "
        "SpatialDropout1D SpatialDropout2D SpatialDropout3D Identity ActivityRegularization",
    ),
}

# `keras.ops` functions become operation objects whose classes are not public: by class name.
OPS_BY_NAME = {
    **dict.fromkeys(
        "Add Subtract Multiply Maximum Minimum Matmul Einsum Mean".split(), Role.ARITHMETIC
    ),
    **dict.fromkeys(
        (
            "Relu Relu6 Silu Sigmoid HardSigmoid HardSilu Gelu Elu Selu LeakyRelu Tanh Softplus"
        ).split(),
        Role.ACTIVATION,
    ),
    **dict.fromkeys(
        "Reshape Transpose Squeeze ExpandDims GetItem Concatenate Pad MaxPool Max Min Identity "
        "Swapaxes Moveaxis BroadcastTo Take Stack Split Ravel".split(),
        Role.MOVEMENT,
    ),
}


def role_of(op):
    """Return the `Role` of an operation (a layer or a `keras.ops` operation object)."""
    if isinstance(op, FakeQuantize):
        return Role.FAKE_QUANTIZE
    if is_weighted(op):
        return Role.WEIGHTED
    if isinstance(op, BatchSized):
        return OPS_BY_NAME.get(op.operation, Role.FLOAT)
    if isinstance(op, keras.layers.Layer):
        return next((OPS[base] for base in type(op).__mro__ if base in OPS), Role.FLOAT)
    return OPS_BY_NAME.get(type(op).__name__, Role.FLOAT)


@dataclasses.dataclass(eq=False, repr=False)
class Edge:
    """A tensor of the graph: `shape` with the batch axis first, its producer, its consumers.

    `mask` is the shape of the implicit mask that Keras carries beside it, or None.
    """

    shape: tuple
    dtype: str
    name: str
    producer: "Node | None" = None
    consumers: list = dataclasses.field(default_factory=list)
    mask: tuple | None = None

    @property
    def is_float(self):
        """Whether it holds floating-point numbers, of any precision."""
        return self.dtype.startswith(("float", "bfloat"))

    def __repr__(self):
        return f"<Edge {self.name} {self.shape}>"


@dataclasses.dataclass(eq=False, repr=False)
class Node:
    """One call of an operation; `args` and `kwargs` hold `Edge`s where tensors go."""

    name: str
    op: object
    args: tuple
    kwargs: dict
    outputs: list = dataclasses.field(default_factory=list)
    reason: str = ""  # why the operation is kept whole, where tracing gave up on it

    @property
    def inputs(self):
        """Input edges in order of appearance (an edge used twice appears twice)."""
        leaves = keras.tree.flatten([list(self.args), self.kwargs])
        return [leaf for leaf in leaves if isinstance(leaf, Edge)]

    @property
    def carried(self):
        """Input edges whose values go into the result, not their size or mask alone."""
        return self.inputs[:1] if isinstance(self.op, (BatchSized, SetMask)) else self.inputs

    @property
    def role(self):
        return Role.FLOAT if self.reason else role_of(self.op)

    @property
    def is_integer_product(self):
        """Whether it multiplies by weights, in integers when its inputs are integers."""
        spec = layer_spec(self.op)
        return spec is not None and spec.computes_in_integers(self.op, self.kwargs)

    @property
    def output(self):
        return self.outputs[0]

    def __repr__(self):
        return f"<Node {self.name}: {type(self.op).__name__}>"


def needed_nodes(nodes, outputs):
    """Return the nodes that outputs depend on: a layer may be called for one of its results."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


@dataclasses.dataclass(eq=False)
class Graph:
    """A flat model: `nodes` in execution order.

    `input_structure` and `output_structure` are the user's nested structures of `Edge`s,
    `weight_map` is the `WeightMap` from the user's weights to those of `nodes`.
    """

    name: str
    nodes: list
    input_structure: object
    output_structure: object
    weight_map: object

    @property
    def inputs(self):
        return keras.tree.flatten(self.input_structure)

    @property
    def outputs(self):
        return keras.tree.flatten(self.output_structure)

    @property
    def edges(self):
        """Every edge in order of production: inputs first."""
        return self.inputs + [edge for node in self.nodes for edge in node.outputs]

    def layer_nodes(self):
        """Return {name: first node} over the operations, each shared operation once."""
        first = {}
        for node in self.nodes:
            first.setdefault(node.name, node)
        return first

    def run(self, inputs, call):
        """Interpret the graph on values.

        Args:
            inputs: list of values, one per input edge.
            call: function `(node, *args, **kwargs) -> outputs` that executes one node.

        Returns:
            Dict from `Edge` to its value.
        """
        values = dict(zip(self.inputs, inputs, strict=True))

        def fill(leaf):
            return values[leaf] if isinstance(leaf, Edge) else leaf

        for node in self.nodes:
            args, kwargs = keras.tree.map_structure(fill, (list(node.args), node.kwargs))
            outputs = keras.tree.flatten(call(node, *args, **kwargs))
            values.update(zip(node.outputs, outputs, strict=True))
        return values


def first_layers(graph):
    """Return the names of the weighted layers with no weighted layer before them."""
    return _outermost((node, node.inputs, node.outputs) for node in graph.nodes)


def last_layers(graph):
    """Return the names of the weighted layers with no weighted layer behind them."""
    return _outermost((node, node.outputs, node.inputs) for node in reversed(graph.nodes))


def _outermost(steps):
    """Return the names of weighted layers that are met before any other on their way.

    Args:
        steps: triples (node, edges that the way comes in by, edges that it leaves by), in order.
    """
    passed = set()  # edges with a weighted layer on the way to them
    found = set()
    for node, entries, exits in steps:
        depends = any(edge in passed for edge in entries)
        if node.role is Role.WEIGHTED and not depends:
            found.add(node.name)
        if depends or node.role is Role.WEIGHTED:
            passed.update(exits)
    return found
