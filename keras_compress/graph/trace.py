"""Any Keras model becomes a flat `Graph` of primitives.

Functional and Sequential models already carry their graph. Composite layers and subclassed models
are called once on symbolic tensors, which records their inner layers and `keras.ops` calls.
What cannot be seen through is kept whole, and its node says why.
"""

import contextlib
import inspect
import re
import warnings

import keras

from keras_compress.compressed_layer import clone_layer, is_weighted
from keras_compress.graph.decompose import (
    SEPARABLE_LAYERS,
    WRAPPERS,
    is_attention,
    split_separable,
)
from keras_compress.graph.record import definite_sizes
from keras_compress.graph.symbolic import (
    ATTENTION_LAYERS,
    call_attention,
    call_symbolically,
    call_unwrapped,
    edges_in,
    mask_is_implicit,
    masks_after,
    recorded,
)
from keras_compress.graph.traced_layers import CausalMask, Parameter, ReadMask, SetMask
from keras_compress.graph.walk import (
    SEPARATOR,
    Edge,
    Graph,
    Node,
    all_layers,
    copy_operation,
    needed_nodes,
    unique_name,
)
from keras_compress.graph.weight_map import WeightMap


def trace(model):
    """Return the flat `Graph` of a built Keras model.

    Args:
        model: a `keras.Model`: Sequential, Functional, subclassed, nested in any way.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has not been built.
    """
    require_built(model)
    with _nodes_restored(model), warnings.catch_warnings():
        # Keras said it when the user's model was made: some layer of theirs drops a mask.
        warnings.filterwarnings("ignore", ".*does not support masking", UserWarning)
        function = _own_graph(model) or _called_graph(model)
        graph = _Tracer(model).graph(model.name, function)
        _settle_sizes(graph)
        return graph


def _settle_sizes(graph):
    """Fill in the sizes that `EinsumDense` layers leave open although their input has them."""
    products = [n for n in graph.nodes if isinstance(n.op, keras.layers.EinsumDense)]
    open_ended = any(None in node.output.shape[1:] for node in products)
    if not open_ended or any(None in edge.shape[1:] for edge in graph.inputs):
        return

    def call(node, *args, **kwargs):
        if isinstance(node.op, ReadMask):  # masks are not carried along here
            return keras.KerasTensor(node.output.shape, node.output.dtype)
        return node.op.compute_output_spec(*args, **kwargs)

    inputs = [keras.KerasTensor(edge.shape, edge.dtype) for edge in graph.inputs]
    with definite_sizes([node.op for node in products]):
        specs = graph.run(inputs, call)
    for edge, spec in specs.items():
        edge.shape = tuple(spec.shape)


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
        self.masks = {}  # edge -> edge of its implicit mask, where that is read
        self.unmasked = {}  # edge -> itself without its implicit mask, where that is read
        self.current = {}  # edge -> what is read in its place since it lost its mask
        self.masked = any(map(_makes_masks, all_layers(model)))

    def graph(self, name, function):
        edges = {}
        for tensor in function.inputs:
            edges[id(tensor)] = Edge(tuple(tensor.shape), tensor.dtype, tensor.name)
            self.taken.add(tensor.name)
            self.edge_names.add(tensor.name)
        inputs = keras.tree.map_structure(lambda t: edges[id(t)], function._inputs_struct)
        self.anchor = edges[id(function.inputs[0])]
        self.walk(recorded(function), edges, path="")
        outputs = keras.tree.map_structure(
            lambda t: self.now(edges[id(t)]), function._outputs_struct
        )
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
                return self.now(edges[id(leaf)]) if isinstance(leaf, keras.KerasTensor) else leaf

            added = self.masked and mask_is_implicit(args, kwargs)
            args, kwargs = keras.tree.map_structure(to_edge, (list(args), dict(kwargs)))
            if added and all(e.mask for e in edges_in(args, {})):  # Keras will add it again
                kwargs.pop("mask", None)
            inner_path = path + record.paths.get(id(op), "")
            outputs = self.call(op, args, kwargs, tensors, inner_path)
            edges.update(zip(map(id, tensors), outputs, strict=True))

    def call(self, op, args, kwargs, outputs, path):
        """Trace one call and return the edges of its outputs."""
        if type(op) in SEPARABLE_LAYERS:
            return [self.separable(op, args[0], path)]
        if isinstance(op, keras.Model) and "mask" in kwargs:
            args, kwargs = self.masked_arguments(args, kwargs, path)
        inner, reason = self.look_inside(op, args, kwargs)
        if inner is None:
            return self.leaf(op, args, kwargs, outputs, path, reason)
        given = edges_in(args, kwargs)
        is_recorded_call = inner.masks is not None
        masks = [self.mask(e, path) for e in given if is_recorded_call and e.mask is not None]
        read = given
        if isinstance(op, ATTENTION_LAYERS):  # from here on, masks are tensors
            read = [self.set_mask(edge, None, path) for edge in given]
        edges = {id(t): edge for t, edge in zip(inner.inputs, [*read, *masks], strict=True)}
        inner_path = "" if op is self.model else self.name(op, path) + SEPARATOR
        for variable, tensor in inner.variables:
            edges[id(tensor)] = self.parameter(variable, inner_path)
        self.walk(inner, edges, inner_path)
        results = [
            self.now(edges[id(t)])
            if isinstance(t, keras.KerasTensor)
            else self.parameter(t, inner_path)
            for t in inner.outputs
        ]
        for index in inner.unmasked:
            self.current[given[index]] = self.set_mask(given[index], None, path)
        if not is_recorded_call:
            return results
        masks = [mask if mask is None else edges[id(mask)] for mask in inner.masks]
        return [self.set_mask(*pair, inner_path) for pair in zip(results, masks, strict=True)]

    def leaf(self, op, args, kwargs, outputs, path, reason=""):
        name = self.name(op, path)
        masks, lost = [None] * len(outputs), []
        if self.masked and isinstance(op, keras.layers.Layer):
            masks, lost = masks_after(op, args, kwargs)
        if not isinstance(op, keras.layers.Layer):
            op = self.bare_operation(op, name)
        node = Node(name, op, tuple(args), kwargs, reason=reason)
        for tensor, mask in zip(outputs, masks, strict=True):
            edge_name = unique_name(name, self.edge_names, f"{SEPARATOR}output")
            edge = Edge(tuple(tensor.shape), tensor.dtype, edge_name, node, mask=mask)
            node.outputs.append(edge)
        for edge in lost:
            edge.mask = None
        self.nodes.append(node)
        return node.outputs

    def now(self, edge):
        """Return the edge that is read in place of another: itself, or itself without its mask."""
        return self.current.get(edge, edge)

    def mask(self, edge, path):
        """Return the edge of the implicit mask of another."""
        if edge not in self.masks:
            layer = ReadMask(name="read_mask", dtype=edge.dtype)
            spec = keras.KerasTensor(edge.mask, dtype="bool")
            (self.masks[edge],) = self.leaf(layer, [edge], {}, [spec], path)
        return self.masks[edge]

    def set_mask(self, edge, mask, path):
        """Return an edge with the implicit mask that another holds, or with none."""
        if (edge.mask is None) == (mask is None):
            return edge
        if mask is None and edge in self.unmasked:
            return self.unmasked[edge]
        layer = SetMask(drop=mask is None, name="set_mask", dtype=edge.dtype)
        kwargs = {} if mask is None else {"mask": mask}
        spec = keras.KerasTensor(edge.shape, dtype=edge.dtype)
        (result,) = self.leaf(layer, [edge], kwargs, [spec], path)
        if mask is None:
            self.unmasked[edge] = result
        return result

    def masked_arguments(self, args, kwargs, path):
        """Return the arguments of a call without `mask`, which the tensors carry instead."""
        kwargs = dict(kwargs)
        masks = keras.tree.flatten(kwargs.pop("mask"))
        edges = keras.tree.flatten(args)
        pairs = zip(edges, masks, strict=True)
        edges = [self.set_mask(edge, mask, path) for edge, mask in pairs]
        return keras.tree.pack_sequence_as(args, edges), kwargs

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
            bare = not isinstance(op, keras.layers.Layer) or isinstance(op, CausalMask)
            base = path + (re.sub(r"_\d+$", "", op.name) if bare and path else op.name)
            self.names[id(op)] = unique_name(base, self.taken, "_")
            self.kept.append(op)
        return self.names[id(op)]

    def look_inside(self, op, args, kwargs):
        """Return (`Record` of a composite or None, reason for keeping it whole)."""
        if not _is_composite(op):
            return None, ""
        own = _own_graph(op)
        if own is not None and _have_shapes(own.inputs, edges_in(args, kwargs)):
            return recorded(own), ""
        if is_attention(op):
            return call_attention(op, args, kwargs), ""
        if isinstance(op, tuple(WRAPPERS)):
            return call_unwrapped(op, args, kwargs)
        if op._seed_generators:
            return None, "has random state of its own beside its inner layers"
        record, reason = call_symbolically(op, args, kwargs)
        opened = {} if record is not None or self.masked else _openable(op)
        if opened:
            record, reason = call_symbolically(op, args, kwargs, opened)
        return record, reason


def _is_composite(op):
    if isinstance(op, (keras.Model, *WRAPPERS, *ATTENTION_LAYERS)) or is_attention(op):
        return True
    if not isinstance(op, keras.layers.Layer) or is_weighted(op):
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
    if type(op).call.__module__.partition(".")[0] not in ("keras", "keras_compress"):
        return None  # the user's subclass does more than its graph
    if isinstance(op, keras.Sequential):
        return op._functional
    return op if isinstance(op, keras.Function) else None


def _have_shapes(tensors, edges):
    """Whether edges have the shapes that a graph was made for."""
    return [tuple(t.shape[1:]) for t in tensors] == [tuple(edge.shape[1:]) for edge in edges]


def _makes_masks(layer):
    """Whether a layer may give its results an implicit mask that its inputs do not have."""
    is_own = type(layer).__module__.partition(".")[0] not in ("keras", "keras_compress")
    makes_own = is_own and type(layer).compute_mask is not keras.layers.Layer.compute_mask
    return (
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False) or makes_own
    )


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
