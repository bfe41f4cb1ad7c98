"""Read a `torch.nn.Module`: the same network as a Keras model, its *shadow*.

The module is traced by `torch.fx` and interpreted on `keras.Input`s, with the axes where PyTorch
has them (`channels_first`). Everything that looks at Keras models then works on the shadow, and
`Converted` says which weight and which tensor of the module each of the shadow's is.
"""

import copy
import dataclasses

import keras
import torch
from torch.fx.node import map_arg

from keras_compress.graph.symbolic import recorded
from keras_compress.graph.trace import trace
from keras_compress.graph.traced_layers import Parameter
from keras_compress.graph.walk import SEPARATOR, unique_name
from keras_compress.torch.decompose import is_tensor, leaves, one_call, plain_transformers, traced
from keras_compress.torch.operations import MODULES, ConversionError, function_row, spelled

TOLERANCE = 1e-3  # of the largest number in the result


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """Where a weight of the shadow lives in the module.

    Attributes:
        path: path of the module, such as "layer1.0.conv1", in the traced graph. That is its path
            in the user's module too, except inside what was taken apart: a `MultiheadAttention`,
            or an `LSTM`, `GRU` or `RNN` of several layers or directions.
        name: name of the parameter or buffer in it, such as "weight".
        axes: permutation that turns the torch tensor into the Keras one.
        shape: shape to give to the result of the permutation, or None.
        blocks: order in which the equal parts of the first torch axis are taken before that, such
            as the gates of a `GRU`, or None.
    """

    path: str
    name: str
    axes: tuple
    shape: tuple | None = None
    blocks: tuple | None = None

    def to_keras(self, tensor):
        """Return a torch tensor in the layout of Keras; gradients pass through."""
        if self.blocks is not None:
            parts = tensor.unflatten(0, (len(self.blocks), -1))
            tensor = parts[list(self.blocks)].flatten(0, 1)
        tensor = tensor.permute(self.axes)
        return tensor if self.shape is None else tensor.reshape(self.shape)

    def to_torch(self, tensor, shape):
        """Return a tensor in the layout of Keras as one of PyTorch: `to_keras` undone.

        Args:
            tensor: the torch tensor to turn back.
            shape: shape of the torch weight.
        """
        tensor = tensor.reshape([shape[axis] for axis in self.axes])
        tensor = tensor.permute([self.axes.index(axis) for axis in range(len(self.axes))])
        if self.blocks is None:
            return tensor
        order = [self.blocks.index(i) for i in range(len(self.blocks))]
        return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A module that has been read.

    Attributes:
        model: the shadow, a Functional `keras.Model`. Its layers have the paths of the modules as
            names, with "-" for ".".
        graph: `torch.fx.GraphModule`, a traced copy of the module with parameters of its own.
        weights: {(name of a layer of the shadow, attribute of its weight): `TorchWeight`}. The bias
            of an `LSTM`, `GRU` or `RNN` is missing: PyTorch has two in its place.
        tensors: {name of an edge of `trace(model)`: name of the fx node that makes the same
            tensor}. The first tensor that an operation makes has the name of the operation.
        nodes: {name of an operation of the shadow: name of the fx node that it is a part of}, of
            the first one where it is used more than once. Padding is an operation of its own in
            Keras: its result has no fx node, but is what the convolution or pooling reads.
    """

    model: keras.Model
    graph: torch.fx.GraphModule
    weights: dict
    tensors: dict
    nodes: dict


def convert(module, example_inputs):
    """Convert a module into a Keras model with the same weights and the same results.

    Args:
        module: a `torch.nn.Module`.
        example_inputs: a tensor, or a tuple of tensors, to call it on; the batch is their first
            axis and stays free.

    Returns:
        A `Converted`. The module itself is left as it is.

    Raises:
        TypeError: an argument is of another type.
        ConversionError: (a `ValueError`) a step of the module is not known, or depends on data, or
            the shadow's results are not those of the module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"Expected a `torch.nn.Module`. Received: module={module!r}")
    examples = _checked(example_inputs)
    own = copy.deepcopy(module).eval()
    graph = traced(copy.deepcopy(own), examples)
    _require_rows(graph)
    build = _Build(graph)
    model = build.model(type(module).__name__.lower())
    _compare(model, own, examples)
    tensors = _tensor_names(model, build.sources)
    modes = {path: each.training for path, each in module.named_modules()}
    for path, each in graph.named_modules():
        each.training = modes.get(path, module.training)
    return Converted(model, graph, build.weights, tensors, build.nodes)


def _checked(example_inputs):
    examples = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    shapes = [tuple(getattr(each, "shape", ())) for each in examples]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise TypeError(
            "Expected a tensor, or a tuple of tensors, with the batch as first axis, of one size. "
            f"Received: example_inputs of types {[type(each).__name__ for each in examples]} and "
            f"shapes {shapes}"
        )
    return tuple(examples)


def _row(graph, node):
    """Return the row of a node with its module bound to it, None where there is none."""
    if node.op != "call_module":
        return function_row(node)
    module = graph.get_submodule(node.target)
    row = MODULES.get(spelled(type(module)))
    if row is not None:
        return lambda build, *args, **kwargs: row(build, module, *args, **kwargs)
    call = one_call(module)
    return lambda build, x: function_row(call)(build, x, *call.args[1:], **call.kwargs)


def _where(graph, node):
    """Return a text that says which node it is, what it calls and in which module."""
    target = getattr(node.target, "__name__", node.target)
    stack = list((node.meta.get("nn_module_stack") or {"": ("",)}).values())
    path = stack[-1][0]
    if node.op == "call_module":
        path, target = node.target, type(graph.get_submodule(node.target)).__name__
    return f"node '{node.name}' ({node.op} of {target}) in module '{path}'"


def _require_rows(graph):
    calls = [n for n in graph.graph.nodes if n.op.startswith("call") and "known" not in n.meta]
    unknown = [_where(graph, node) for node in calls if _row(graph, node) is None]
    if unknown:
        raise ConversionError(
            "Expected operations that have a counterpart in Keras. Rewrite what has none, or "
            f"compress the parts around it. Received: {'; '.join(unknown)}"
        )


class _Build:
    """The walk over the graph: makes the shadow and notes what is what.

    Rows of the tables use `run`, `layer`, `name`, `where`, `shape` and `dtype` (of
    what the current node makes) and `anchor` (any tensor with the batch as first axis).
    """

    def __init__(self, graph):
        self.graph, self.anchor = graph, None
        nodes = graph.graph.nodes
        self.values = {node: node.meta["known"] for node in nodes if "known" in node.meta}
        self.weights, self.nodes, self.layers = {}, {}, {}
        self.sources = {}  # id(Keras tensor) -> name of the fx node that makes the same one
        modules = (path for path, _ in graph.named_modules() if path)
        self.reserved = {path: path.replace(".", SEPARATOR) for path in modules}
        self.taken = set(self.reserved.values())

    def model(self, name):
        """Return the shadow."""
        *nodes, output = self.graph.graph.nodes
        for node in nodes:
            self.node = node
            if node not in self.values:
                value = self.values[node] = self.value()
                if is_tensor(value):
                    self.sources.setdefault(id(value), node.name)
        self.node = output
        inputs = [self.values[node] for node in nodes if node.op == "placeholder"]
        outputs = map_arg(output.args[0], self.values.get)
        others = [leaf for leaf in leaves(outputs) if not is_tensor(leaf)]
        if others:
            raise ConversionError(
                "Expected results that are tensors and depend on the inputs. "
                f"Received: {others[0]!r}"
            )
        return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=name)

    def value(self):
        """Return what the current node makes."""
        node = self.node
        if node.op == "placeholder":
            value = keras.Input(self.shape[1:], dtype=self.dtype, name=self.name())
            self.nodes[value.name] = node.name
            self.anchor = value if self.anchor is None else self.anchor
            return value
        if node.op == "get_attr":
            return self.parameter()
        args, kwargs = map_arg((node.args, node.kwargs), self.values.get)
        args = (*(kwargs[name] for name in kwargs if name == "input"), *args)
        kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        try:
            return _row(self.graph, node)(self, *args, **kwargs)
        except ConversionError:
            raise
        except Exception as error:  # whatever Keras raises for arguments it does not know
            raise ConversionError(
                f"Expected arguments that the operation takes in Keras. Received: {self.where()}; "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def shape(self):
        made = self.node.meta["made"]
        return tuple(made.shape) if hasattr(made, "shape") else tuple(x.shape for x in made)

    @property
    def dtype(self):
        return self.node.meta["made"].dtype

    def where(self):
        """Return a text that says which node this is."""
        return _where(self.graph, self.node)

    def name(self, suffix=""):
        """Return a name that is free: the path of the module, or the name of the node."""
        path = self.node.target if self.node.op == "call_module" else ""
        if not suffix and path in self.reserved:
            return self.reserved.pop(path)
        base = path.replace(".", SEPARATOR) or self.node.name
        return unique_name(base + suffix, self.taken)

    def run(self, function, *args, suffix="", **kwargs):
        """Call an operation of Keras or a layer on tensors, and note it."""
        given = {id(x): x for x in keras.tree.flatten([args, kwargs]) if is_tensor(x)}
        if not given:
            raise ConversionError(f"Expected an input in every step. Received: {self.where()}")
        results = function(*args, **kwargs)
        outputs = keras.tree.flatten(results)
        if not isinstance(function, keras.layers.Layer):
            function = keras.Function(list(given.values()), outputs).operations[-1]
            function.name = self.name(suffix)
        self.nodes.setdefault(function.name, self.node.name)
        return results

    def layer(self, make, x, weights=None, suffix="", given=None, **options):
        """Call a layer that stands for the current node or a part of it.

        Args:
            make: class of the layer.
            x: the tensor to call it on.
            weights: {attribute: arguments of a `TorchWeight` after its path}, bias left out, of
                the module that is called. A layer with weights is made at the first call.
            suffix: end of the name of a part.
            given: dict of further arguments of the call.
            **options: of the layer.
        """
        path, given = self.node.target, given or {}
        if weights is None:
            return self.run(make(name=self.name(suffix), **options), x)
        if path in self.layers:
            return self.run(self.layers[path], x, **given)
        layer = self.layers[path] = make(name=self.name(), **options)
        results = self.run(layer, x, **given)
        module = self.graph.get_submodule(path)
        if isinstance(module, torch.nn.RNNBase):
            self.set_recurrent_bias(module, layer.cell.bias, weights["kernel"][3])
        elif options.get("use_bias"):
            weights = weights | {"bias": ("bias", (0,))}
        for attribute, value in weights.items():
            variable = getattr(getattr(layer, "cell", layer), attribute)
            self.bind(layer, attribute, variable, TorchWeight(path, *value))
        return results

    def set_recurrent_bias(self, module, bias, blocks):
        """Give a recurrent layer its bias: that of an `LSTM` in Keras is the sum of PyTorch's."""
        if module.bias:
            order = TorchWeight("", "", (0,), blocks=blocks)
            pair = [order.to_keras(x.detach()) for x in (module.bias_ih_l0, module.bias_hh_l0)]
            pair = torch.stack(pair)
            bias.assign(pair if len(bias.shape) == 2 else pair.sum(0))

    def bind(self, layer, attribute, variable, weight):
        """Note where a variable lives in the module, and give it the value from there."""
        value = getattr(self.graph.get_submodule(weight.path), weight.name)
        variable.assign(weight.to_keras(value.detach()))
        self.weights[layer.name, attribute] = weight

    def parameter(self):
        """Return a parameter or buffer that a module holds itself, such as a class token."""
        path, _, name = self.node.target.rpartition(".")
        value = getattr(self.graph.get_submodule(path), name)
        base = self.node.target.replace(".", SEPARATOR)
        layer = Parameter(tuple(value.shape), name=unique_name(base, self.taken))
        layer.trainable = value.requires_grad
        result = self.run(layer, self.anchor)
        self.bind(layer, "value", layer.value, TorchWeight(path, name, tuple(range(value.ndim))))
        return result


@plain_transformers()
def _compare(model, module, examples):
    """Raise unless the shadow's results are those of the module."""
    with torch.no_grad():
        results = keras.tree.flatten(model(list(examples) if len(examples) > 1 else examples[0]))
        expected = keras.tree.flatten(module(*(each.clone() for each in examples)))
    for one, other in zip(results, expected, strict=True):
        one, other = one.cpu().double(), other.cpu().double()
        largest = other.abs().max().item() or 1.0
        same = one.shape == other.shape
        difference = (one - other).abs().max().item() if same else torch.inf
        if not difference <= TOLERANCE * largest:
            raise ConversionError(
                "Expected a module whose results its Keras counterpart repeats. No operation may "
                "write into a tensor that is read again (`inplace=True`), and none may be random "
                f"in evaluation. Received: module={type(module).__name__}, whose results differ by "
                f"{difference:.2g} where the largest number is {largest:.2g}"
            )


def _tensor_names(model, sources):
    """Return {name of an edge of the traced shadow: name of the fx node}."""
    record = recorded(model)
    tensors = [*record.inputs, *(tensor for call in record.calls for tensor in call[-1])]
    pairs = zip(trace(model).edges, tensors, strict=True)
    return {edge.name: sources[id(x)] for edge, x in pairs if id(x) in sources}
