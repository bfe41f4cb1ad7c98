"""Any Keras model becomes a flat `Graph` of primitives.

Functional and Sequential models already carry their graph. Composite layers and subclassed models
are called once on symbolic tensors, which records their inner layers and `keras.ops` calls.
What cannot be seen through is kept whole, and its node says why.
"""

import contextlib
import inspect
import re

import keras

from keras_compress.graph.decompose import WRAPPERS, attention, is_attention, unwrapped
from keras_compress.graph.walk import SEPARATOR, Edge, Graph, Node, copy_operation, unique_name
from keras_compress.graph.weight_map import WeightMap
from keras_compress.layers import layer_spec

COMPOSITE_LAYERS = tuple(
    getattr(keras.layers, name)
    for name in ("MultiHeadAttention", "GroupQueryAttention")
    if hasattr(keras.layers, name)
)
MASKED = "reads an implicit mask, which tracing would lose"
SEPARABLE_LAYERS = {
    keras.layers.SeparableConv1D: (keras.layers.DepthwiseConv1D, keras.layers.Conv1D),
    keras.layers.SeparableConv2D: (keras.layers.DepthwiseConv2D, keras.layers.Conv2D),
}


def trace(model):
    """Return the flat `Graph` of a built Keras model.

    Args:
        model: a `keras.Model`: Sequential, Functional, subclassed, nested in any way.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has not been built.
    """
    require_built(model)
    with _nodes_restored(model):
        function = _own_graph(model) or _called_graph(model)
        return _Tracer(model).graph(model.name, function)


def require_built(model):
    """Raise unless `model` is a built Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a Keras 3 model (`keras.Model`). Received: model={model!r} "
            f"(of type {type(model).__module__}.{type(model).__name__})"
        )
    if not model.built or (isinstance(model, keras.Sequential) and model._functional is None):
        raise ValueError(
            f"Expected a built model. Model '{model.name}' has no input shape yet: call it on a "
            "batch, or `model.build(input_shape)`, or start it with `keras.Input`. "
            f"Received: model={model!r}"
        )


def accepts_training(op):
    """Whether an operation is a layer whose `call` takes `training`."""
    return "training" in getattr(op, "_call_context_args", ())


class _Tracer:
    """Collects nodes while walking into nested graphs; names stay unique."""

    def __init__(self, model):
        self.model = model
        self.nodes = []
        self.names = {}  # id(op) -> name; shared operations are named once
        self.taken = set()
        self.edge_names = set()
        self.clones = {}  # id(original op) -> (copy of a bare operation | replacement layers)
        self.originals = {}  # id(variable made here) -> the user's variable it is a copy of
        self.kept = []  # keeps ids valid while tracing
        layers = model._flatten_layers(include_self=False, recursive=True)
        self.masked = any(
            isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
            for layer in layers
        )

    def graph(self, name, function):
        edges = {}
        for tensor in function.inputs:
            edges[id(tensor)] = Edge(tuple(tensor.shape), tensor.dtype, tensor.name)
            self.taken.add(tensor.name)
            self.edge_names.add(tensor.name)
        inputs = keras.tree.map_structure(lambda t: edges[id(t)], function._inputs_struct)
        self.walk(function, edges, path="")
        outputs = keras.tree.map_structure(lambda t: edges[id(t)], function._outputs_struct)
        for node in self.nodes:
            for edge in node.inputs:
                edge.consumers.append(node)
        weight_map = WeightMap.of(self.model, self.nodes, self.originals)
        return Graph(name, self.nodes, inputs, outputs, weight_map)

    def walk(self, function, edges, path):
        """Append the nodes of a Keras `Function`; `edges` maps its tensors (by id) to edges."""
        self.kept.append(function)
        for keras_node in _nodes_of(function):
            if keras_node.is_input or any(id(t) in edges for t in keras_node.outputs):
                continue
            if any(id(t) not in edges for t in keras_node.input_tensors):
                continue

            def to_edge(leaf):
                return edges[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf

            arguments = keras_node.arguments
            args, kwargs = keras.tree.map_structure(
                to_edge, (list(arguments.args), dict(arguments.kwargs))
            )
            outputs = self.call(keras_node.operation, args, kwargs, keras_node.outputs, path)
            edges.update(zip(map(id, keras_node.outputs), outputs, strict=True))

    def call(self, op, args, kwargs, outputs, path):
        """Trace one call and return the edges of its outputs."""
        if type(op) in SEPARABLE_LAYERS:
            return [self.separable(op, args[0], path)]
        inner, reason = self.look_inside(op, args, kwargs)
        if inner is None:
            return self.leaf(op, args, kwargs, outputs, path, reason)
        leaves = keras.tree.flatten([args, kwargs])
        given = [leaf for leaf in leaves if isinstance(leaf, Edge)]
        edges = {id(t): edge for t, edge in zip(inner.inputs, given, strict=True)}
        inner_path = "" if op is self.model else self.name(op, path) + SEPARATOR
        self.walk(inner, edges, inner_path)
        return [edges[id(t)] for t in inner.outputs]

    def leaf(self, op, args, kwargs, outputs, path, reason=""):
        name = self.name(op, path)
        if not isinstance(op, keras.layers.Layer):
            op = self.bare_operation(op, name)
        node = Node(name, op, tuple(args), kwargs, reason=reason)
        for tensor in outputs:
            edge_name = unique_name(name, self.edge_names, f"{SEPARATOR}output")
            node.outputs.append(Edge(tuple(tensor.shape), tensor.dtype, edge_name, node))
        self.nodes.append(node)
        return node.outputs

    def bare_operation(self, op, name):
        """Copy a stateless `keras.ops` operation so that the user's own graph is left alone."""
        if id(op) not in self.clones:
            self.clones[id(op)] = copy_operation(op, name)
            self.kept.append(op)
        return self.clones[id(op)]

    def separable(self, layer, edge, path):
        """Split a separable convolution into its depthwise and its pointwise half."""
        if id(layer) not in self.clones:
            halves = self.clones[id(layer)] = _split_separable(layer, self.name(layer, path))
            copies = [variable for half in halves for variable in half.weights]
            self.originals.update(zip(map(id, copies), layer.weights, strict=True))
        for half in self.clones[id(layer)]:
            spec = keras.KerasTensor(half.compute_output_shape(edge.shape), dtype=edge.dtype)
            (edge,) = self.leaf(half, [edge], {}, [spec], path="")
        return edge

    def name(self, op, path):
        """Return the unique qualified name of an operation: `outer-inner`."""
        if id(op) not in self.names:
            bare = not isinstance(op, keras.layers.Layer)
            base = path + (re.sub(r"_\d+$", "", op.name) if bare and path else op.name)
            self.names[id(op)] = unique_name(base, self.taken, "_")
            self.kept.append(op)
        return self.names[id(op)]

    def look_inside(self, op, args, kwargs):
        """Return (`keras.Function` of a composite or None, reason for keeping it whole)."""
        if not _is_composite(op):
            return None, ""
        own = _own_graph(op)
        if own is not None:
            return own, ""
        if is_attention(op):
            return _attention(args, kwargs), ""
        if self.masked and "mask" in "".join(inspect.signature(op.call).parameters):
            return None, MASKED
        if isinstance(op, tuple(WRAPPERS)):
            return _unwrapped(op, args, kwargs)
        if op._trainable_variables or op._non_trainable_variables or op._seed_generators:
            return None, "has weights or random state of its own beside its inner layers"
        return _call_symbolically(op, args, kwargs)


def _is_composite(op):
    if isinstance(op, (keras.Model, *WRAPPERS, *COMPOSITE_LAYERS)) or is_attention(op):
        return True
    if not isinstance(op, keras.layers.Layer) or layer_spec(op) is not None:
        return False
    if type(op).__module__.partition(".")[0] in ("keras", "keras_compress"):
        return False
    return bool(op._flatten_layers(include_self=False, recursive=False))


def _own_graph(op):
    """Return the graph that a Functional or Sequential model already carries, or None."""
    if type(op).call.__module__.partition(".")[0] != "keras":
        return None  # the user's subclass does more than its graph
    if isinstance(op, keras.Sequential):
        return op._functional
    return op if isinstance(op, keras.Function) else None


def _call_symbolically(op, args, kwargs):
    """Call `op.call` on fresh symbolic tensors; accept it only when training changes no node."""

    def record(**training):
        def fresh(leaf):
            if not isinstance(leaf, Edge):
                return leaf
            return keras.Input(batch_shape=leaf.shape, dtype=leaf.dtype)

        new_args, new_kwargs = keras.tree.map_structure(fresh, (args, kwargs))
        new_kwargs |= training
        inputs = [
            leaf
            for leaf in keras.tree.flatten([new_args, {**new_kwargs}])
            if isinstance(leaf, keras.KerasTensor)
        ]
        return keras.Function(inputs, op.call(*new_args, **new_kwargs))

    try:
        parameters = inspect.signature(op.call).parameters
        if "training" not in parameters:
            function = record()
        elif _described(record(training=True)) != _described(record(training=False)):
            return None, "runs other operations in training than in inference"
        elif "training" in inspect.signature(op.call).bind(*args, **kwargs).arguments:
            function = record()
        else:
            # A default of False is no decision: inner layers are to follow the outer model.
            function = record(training=parameters["training"].default is True or None)
        if any(_holds_variable(node) for node in _nodes_of(function)):
            return None, "uses variables outside of a layer"
    except Exception as error:  # whatever a user's `call` may raise on symbolic tensors
        line = str(error).strip().splitlines() or [""]
        return None, f"cannot be traced ({type(error).__name__}: {line[0][:120]})"
    return function, ""


def _nodes_of(function):
    """Return the Keras nodes of a `Function` in execution order."""
    depths = sorted(function._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in function._nodes_by_depth[depth]]


def _described(function):
    """Return what a `Function` does, comparable between two records of the same `call`."""

    def describe(node):
        op, arguments = node.operation, node.arguments
        kwargs = {key: value for key, value in arguments.kwargs.items() if key != "training"}
        leaves = keras.tree.flatten([list(arguments.args), kwargs])
        constants = [repr(leaf) for leaf in leaves if not isinstance(leaf, keras.KerasTensor)]
        if isinstance(op, keras.layers.Layer):
            return id(op), constants
        settings = {k: v for k, v in vars(op).items() if k != "name" and not k.startswith("_")}
        return type(op), repr(settings), constants

    return [describe(node) for node in _nodes_of(function) if not node.is_input]


def _holds_variable(keras_node):
    arguments = keras_node.arguments
    leaves = keras.tree.flatten([list(arguments.args), dict(arguments.kwargs)])
    return any(isinstance(leaf, keras.Variable) for leaf in leaves)


def _called_graph(model):
    """Return a graph of one node: a subclassed model called on inputs of its build shapes."""
    shapes = model._build_shapes_dict or {}
    structures = {key.removesuffix("_shape"): shape for key, shape in shapes.items()}
    if set(structures) == {"input"}:
        structures = {next(iter(inspect.signature(model.call).parameters)): structures["input"]}

    def make_input(shape):
        return keras.Input(batch_shape=(None, *shape[1:]), dtype=model.variable_dtype)

    kwargs = {
        name: keras.tree.map_shape_structure(make_input, _untracked(shape))
        for name, shape in structures.items()
    }
    inputs = keras.tree.flatten(kwargs)
    for index, tensor in enumerate(inputs):
        tensor.name = "input" if len(inputs) == 1 else f"input_{index}"
    structure = next(iter(kwargs.values())) if len(kwargs) == 1 else inputs
    return keras.Function(structure, model(**kwargs))


def _untracked(structure):
    """Return a structure of shapes without the tracked lists and dicts that Keras keeps it in."""
    if isinstance(structure, dict):
        return {key: _untracked(value) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_untracked(value) for value in structure]
    return structure


@contextlib.contextmanager
def _nodes_restored(model):
    """Take back the nodes that symbolic calls add to the layers of the user's model."""
    layers = model._flatten_layers(include_self=True, recursive=True)
    counts = [(x, len(x._inbound_nodes), len(x._outbound_nodes)) for x in layers]
    try:
        yield
    finally:
        for layer, inbound, outbound in counts:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]


def _unwrapped(op, args, kwargs):
    """Return (`keras.Function` of what a wrapper does with its inner layers or None, reason)."""
    given = [leaf for leaf in keras.tree.flatten([args, kwargs]) if isinstance(leaf, Edge)]
    if len(given) != 1:
        return None, "takes more than one tensor: initial states or a mask"
    inputs = keras.Input(batch_shape=given[0].shape, dtype=given[0].dtype)
    outputs, reason = unwrapped(op, inputs)
    return (None, reason) if reason else (keras.Function(inputs, outputs), "")


def _attention(args, kwargs):
    """Return the `keras.Function` of an attention's two products."""
    tensors = []

    def fresh(leaf):
        if not isinstance(leaf, Edge):
            return leaf
        tensors.append(keras.Input(batch_shape=leaf.shape, dtype=leaf.dtype))
        return tensors[-1]

    args, kwargs = keras.tree.map_structure(fresh, (list(args), kwargs))
    return keras.Function(tensors, attention(*args, **kwargs))


def _split_separable(layer, name):
    """Return (depthwise, pointwise) layers that compute what a separable convolution computes."""
    depthwise_class, pointwise_class = SEPARABLE_LAYERS[type(layer)]
    shared = {"data_format": layer.data_format, "dtype": layer.dtype_policy}
    depthwise = depthwise_class(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
        name=f"{name}{SEPARATOR}depthwise",
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        **shared,
    )
    pointwise = pointwise_class(
        layer.filters,
        1,
        padding=layer.padding,
        use_bias=layer.use_bias,
        activation=layer.activation,
        name=f"{name}{SEPARATOR}pointwise",
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        activity_regularizer=layer.activity_regularizer,
        trainable=layer.trainable,
        **shared,
    )
    channel_axis = -1 if layer.data_format == "channels_last" else 1
    shape = [None] * (layer.rank + 2)
    shape[channel_axis] = layer.input_spec.axes[channel_axis]
    depthwise.build(tuple(shape))
    shape[channel_axis] *= layer.depth_multiplier
    pointwise.build(tuple(shape))
    depthwise.kernel.assign(keras.ops.convert_to_numpy(layer.depthwise_kernel))
    pointwise.set_weights(
        [
            keras.ops.convert_to_numpy(w)
            for w in (layer.pointwise_kernel, layer.bias)
            if w is not None
        ]
    )
    return depthwise, pointwise
