"""Any Keras model becomes a flat `Graph` of primitives.

Functional and Sequential models already carry their graph. Composite layers and subclassed models
are called once on symbolic tensors, which records their inner layers and `keras.ops` calls.
What cannot be seen through is kept whole, and its node says why.
"""

import contextlib
import inspect
import re
import types

import keras

from keras_compress.graph.decompose import (
    SEPARABLE_LAYERS,
    WRAPPERS,
    attention,
    is_attention,
    split_separable,
    unwrapped,
)
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
from keras_compress.graph.traced_layers import Parameter
from keras_compress.graph.walk import (
    SEPARATOR,
    Edge,
    Graph,
    Node,
    copy_operation,
    needed_nodes,
    unique_name,
)
from keras_compress.graph.weight_map import WeightMap
from keras_compress.layers import clone_layer, layer_spec

COMPOSITE_LAYERS = tuple(
    getattr(keras.layers, name)
    for name in ("MultiHeadAttention", "GroupQueryAttention")
    if hasattr(keras.layers, name)
)
MASKED = "reads an implicit mask, which tracing would lose"


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
        self.anchor = edges[id(function.inputs[0])]
        self.walk(_recorded(function), edges, path="")
        outputs = keras.tree.map_structure(lambda t: edges[id(t)], function._outputs_struct)
        nodes = needed_nodes(self.nodes, keras.tree.flatten(outputs))
        for node in nodes:
            for edge in node.inputs:
                edge.consumers.append(node)
        weight_map = WeightMap.of(self.model, nodes, self.originals)
        return Graph(name, nodes, inputs, outputs, weight_map)

    def walk(self, record, edges, path):
        """Append the nodes of a `Record`; `edges` maps its tensors (by id) to edges."""
        self.kept.append(record)
        for op, args, kwargs, tensors in record.calls:
            given = keras.tree.flatten([args, kwargs])
            given = [id(leaf) for leaf in given if isinstance(leaf, keras.KerasTensor)]
            if any(id(t) in edges for t in tensors) or any(t not in edges for t in given):
                continue

            def to_edge(leaf):
                return edges[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf

            args, kwargs = keras.tree.map_structure(to_edge, (list(args), dict(kwargs)))
            inner_path = path + record.paths.get(id(op), "")
            outputs = self.call(op, args, kwargs, tensors, inner_path)
            edges.update(zip(map(id, tensors), outputs, strict=True))

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
        for variable, tensor in inner.variables:
            edges[id(tensor)] = self.parameter(variable, inner_path)
        self.walk(inner, edges, inner_path)
        return [
            edges[id(t)] if isinstance(t, keras.KerasTensor) else self.parameter(t, inner_path)
            for t in inner.outputs
        ]

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

    def parameter(self, value, path):
        """Return the edge of a variable that a traced layer holds itself, or of a constant."""
        if id(value) not in self.clones:
            is_variable = isinstance(value, keras.Variable)
            layer = Parameter(
                value.shape,
                name=value.name if is_variable else "constant",
                dtype=keras.backend.standardize_dtype(value.dtype),
                trainable=is_variable and value.trainable,
            )
            layer.build(None)
            layer.value.assign(keras.ops.convert_to_numpy(value))
            spec = layer.compute_output_spec(None)
            (self.clones[id(value)],) = self.leaf(layer, [self.anchor], {}, [spec], path)
            self.originals[id(layer.value)] = value
            self.kept.append(value)
        return self.clones[id(value)]

    def separable(self, layer, edge, path):
        """Split a separable convolution into its depthwise and its pointwise half."""
        if id(layer) not in self.clones:
            halves = self.clones[id(layer)] = split_separable(layer, self.name(layer, path))
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
        """Return (`Record` of a composite or None, reason for keeping it whole)."""
        if not _is_composite(op):
            return None, ""
        own = _own_graph(op)
        reads_mask = self.masked and "mask" in "".join(inspect.signature(op.call).parameters)
        if own is not None and (reads_mask or _has_shapes(own.inputs, args, kwargs)):
            return _recorded(own), ""
        if is_attention(op):
            return _attention(args, kwargs), ""
        if reads_mask:
            return None, MASKED
        if isinstance(op, tuple(WRAPPERS)):
            return _unwrapped(op, args, kwargs)
        if op._seed_generators:
            return None, "has random state of its own beside its inner layers"
        record, reason = _call_symbolically(op, args, kwargs)
        opened = {} if record is not None or self.masked else _openable(op)
        if opened:
            record, reason = _call_symbolically(op, args, kwargs, opened)
        return record, reason


def _is_composite(op):
    if isinstance(op, (keras.Model, *WRAPPERS, *COMPOSITE_LAYERS)) or is_attention(op):
        return True
    if not isinstance(op, keras.layers.Layer) or layer_spec(op) is not None:
        return False
    if type(op).__module__.partition(".")[0] in ("keras", "keras_compress"):
        return False
    return bool(op._flatten_layers(include_self=False, recursive=False)) or not _is_copyable(op)


def _is_copyable(layer):
    try:
        clone_layer(layer, layer.name)
    except ValueError:
        return False
    return True


def _own_graph(op):
    """Return the graph that a Functional or Sequential model already carries, or None."""
    if type(op).call.__module__.partition(".")[0] != "keras":
        return None  # the user's subclass does more than its graph
    if isinstance(op, keras.Sequential):
        return op._functional
    return op if isinstance(op, keras.Function) else None


def _has_shapes(tensors, args, kwargs):
    """Whether the edges among arguments have the shapes that a graph was made for."""
    edges = [leaf for leaf in keras.tree.flatten([args, kwargs]) if isinstance(leaf, Edge)]
    return [tuple(t.shape[1:]) for t in tensors] == [tuple(edge.shape[1:]) for edge in edges]


def _openable(op, path=""):
    """Return {id: (layer, path)} of the composites inside one, at any depth, that may be opened.

    A composite whose results are no tensors cannot be a step of a graph: it is recorded as part of
    the one that calls it.
    """
    found = {}
    for layer in op._flatten_layers(include_self=False, recursive=False):
        if _is_composite(layer) and not layer._seed_generators:
            inner = f"{path}{layer.name}{SEPARATOR}"
            found |= {id(layer): (layer, inner)} | _openable(layer, inner)
    return found


def _call_symbolically(op, args, kwargs, opened=types.MappingProxyType({})):
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
    """Return (list of symbolic tensors, args, kwargs) with those in place of edges."""

    def fresh(leaf):
        if not isinstance(leaf, Edge):
            return leaf
        shape = (batch, *leaf.shape[1:]) if _batch_is_unknown(leaf) else leaf.shape
        return keras.Input(batch_shape=shape, dtype=leaf.dtype)

    args, kwargs = keras.tree.map_structure(fresh, (args, kwargs))
    leaves = keras.tree.flatten([args, {**kwargs}])
    return [leaf for leaf in leaves if isinstance(leaf, keras.KerasTensor)], args, kwargs


def _record(op, args, kwargs, batch, opened):
    """Call `op.call` once, on fresh symbolic tensors in place of edges and of its own variables."""
    inputs, args, kwargs = _symbolic(args, kwargs, batch)
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
        outputs = keras.tree.flatten(op.call(*args, **kwargs))
        made = [leaf for leaf in outputs if isinstance(leaf, keras.KerasTensor)]
        calls = _recorded(keras.Function([*inputs, *(t for _, t in variables)], made)).calls
    paths = {
        id(x): path
        for layer, path in opened.values()
        for x in layer._flatten_layers(include_self=False, recursive=False)
    }
    return Record(inputs, outputs, calls, variables, paths)


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


def _recorded(function):
    """Return a Keras `Function` as a `Record`."""
    calls = [
        (node.operation, node.arguments.args, node.arguments.kwargs, node.outputs)
        for node in _nodes_of(function)
        if not node.is_input
    ]
    return Record(list(function.inputs), keras.tree.flatten(function._outputs_struct), calls)


def _nodes_of(function):
    """Return the Keras nodes of a `Function` in execution order."""
    depths = sorted(function._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in function._nodes_by_depth[depth]]


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
    """Return (`Record` of what a wrapper does with its inner layers or None, reason)."""
    given = [leaf for leaf in keras.tree.flatten([args, kwargs]) if isinstance(leaf, Edge)]
    if len(given) != 1:
        return None, "takes more than one tensor: initial states or a mask"
    inputs = keras.Input(batch_shape=given[0].shape, dtype=given[0].dtype)
    outputs, reason = unwrapped(op, inputs)
    return (None, reason) if reason else (_recorded(keras.Function(inputs, outputs)), "")


def _attention(args, kwargs):
    """Return the `Record` of an attention's two products."""
    inputs, args, kwargs = _symbolic(list(args), kwargs)
    return _recorded(keras.Function(inputs, attention(*args, **kwargs)))
