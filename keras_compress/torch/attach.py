"""What joins a torch module to its shadow: shared weights, transforms, quantizers on edges.

The shadow is the compressed Keras model of the module's conversion. It is never trained: the module
computes and learns, through the very transforms of the shadow, whose variables are parameters of
the module.
"""

import dataclasses
import functools

import keras
import torch
from torch.nn.utils import parametrize

from keras_compress.export.saved_model import input_step
from keras_compress.graph.walk import unique_name
from keras_compress.layers import CompressedLayer, FakeQuantize
from keras_compress.torch.fake_quantize import FakeQuantize as TorchFakeQuantize
from keras_compress.torch.fake_quantize import has_operation

PADDINGS = keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D
FLAGS = ("calibrated", "signed")  # of a quantizer, beside its variables


class Transformed(torch.nn.Module):
    """A transform of the shadow as a torch module: a parametrization, or a node of the graph.

    The variables of the transform are its parameters, those that are not trained without gradient.

    Quantizers of edges compute in evaluation what `strip` and `export` fix.

    Args:
        transform: the `Transform`.
        weight: `TorchWeight` where it sits on a weight; None on an edge.
        fixed: for a quantizer of an edge: function that returns a plain module of it as it is now,
            or None.
    """

    def __init__(self, transform, weight=None, fixed=None):
        super().__init__()
        # Out of sight of torch, which would see Keras' parameters under names with running numbers.
        self._held = (transform, weight, fixed)
        self._fixed = []  # (state, what `fixed` made of it)
        taken = set()
        for variable in transform.variables:
            self.register_parameter(unique_name(variable.name, taken), variable.value)

    def forward(self, inputs):
        transform, weight, fixed = self._held
        plain = None if self.training or fixed is None else self._plain()
        if plain is not None:
            return plain.to(inputs.device)(inputs)
        values = inputs if weight is None else weight.to_keras(inputs)
        outputs = transform(values.float(), training=self.training).to(inputs.dtype)
        if weight is None:
            return outputs
        # Laid out as a plain weight is: others make torch choose kernels with other rounding.
        outputs = weight.to_torch(outputs, inputs.shape)
        if outputs.stride() == inputs.stride():
            return outputs
        return outputs.clone(memory_format=torch.contiguous_format)

    def train(self, mode=True):
        """Set the mode, as `torch.nn.Module.train` does."""
        self._fixed.clear()
        return super().train(mode)

    def _plain(self):
        """Return what the function `fixed` makes of the quantizer, anew where that has changed."""
        transform, _, fixed = self._held
        state = [parameter._version for parameter in self.parameters()]
        state += [transform.calibrated, transform.observer, getattr(transform, "signed", None)]
        if not self._fixed or self._fixed[0] != state:
            self._fixed[:] = state, fixed()
        return self._fixed[1]

    def get_extra_state(self):
        """Return what a quantizer knows beside its variables: whether it has a range, and signs."""
        transform, *_ = self._held
        return {name: getattr(transform, name) for name in FLAGS if hasattr(transform, name)}

    def set_extra_state(self, state):
        """Take up what `get_extra_state` returned."""
        transform, *_ = self._held
        for name, value in state.items():
            setattr(transform, name, value)


def insert_quantizers(module, shadow, make):
    """Put a module behind every tensor that the shadow rounds, for the readers that it rounds for.

    Args:
        module: `torch.fx.GraphModule` with the nodes of `shadow.original`, changed in place.
        shadow: the `Shadow`.
        make: function of the node of a `FakeQuantize` layer that returns the module.

    Raises:
        ValueError: a tensor exists in the shadow only.
    """
    graph = shadow.model.graph()
    nodes = {node.name: node for node in module.graph.nodes}
    produced = {edge: nodes.get(shadow.tensors.get(edge.name)) for edge in graph.edges}
    steps = {nodes[name] for name in shadow.nodes.values()}
    for node in graph.nodes:
        if not isinstance(node.op, FakeQuantize):
            continue
        source = produced[_before_padding(node.inputs[0], produced)]
        if source is None:
            raise ValueError(
                f"Expected a tensor of the torch module in the place of '{node.inputs[0].name}', "
                f"which '{node.name}' is to round. Received: one that exists inside of a torch "
                "module only. Leave it out by `ignored_scopes`"
            )
        if node.name not in module._modules:
            module.add_submodule(node.name, make(node))
        with module.graph.inserting_after(source):
            rounded = module.graph.call_module(node.name, (source,))
        produced[node.output] = rounded
        for reader in _readers(node.output, graph, shadow.nodes, nodes):
            _reroute(source, rounded, reader, steps)
    module.graph.lint()
    module.recompile()


def fixed_quantizer(node):
    """Return the module that computes as the quantizer of a node does now, in torch's operations.

    Returns:
        None where the quantizer has no range yet, or torch has no operation for its grid.
    """
    quantizer = node.op.quantizer
    if not quantizer.is_on:
        return torch.nn.Identity()
    if not quantizer.calibrated or quantizer.observer is not None or not has_operation(quantizer):
        return None
    return TorchFakeQuantize(quantizer, input_step(node))


def _before_padding(edge, produced):
    """Return the tensor whose padded one is rounded: torch pads inside of a module.

    Zero is on every grid, so it makes no difference which comes first.
    """
    while produced[edge] is None and isinstance(getattr(edge.producer, "op", None), PADDINGS):
        edge = edge.producer.inputs[0]
    return edge


def _readers(edge, graph, names, nodes):
    """Return the nodes of the module that read a tensor of the shadow, quantizers left out."""
    consumers = [each for each in edge.consumers if not isinstance(each.op, FakeQuantize)]
    found = [nodes[names[each.name]] for each in consumers]
    if edge in graph.outputs:
        found.append(next(node for node in nodes.values() if node.op == "output"))
    return found


def _reroute(source, rounded, reader, steps):
    """Let a reader of a tensor, or a node that hands it on unchanged, read the rounded one."""

    def leads(node):
        # A module that is called several times is one operation of the shadow.
        same = node.op == "call_module" == reader.op and node.target == reader.target
        return node is reader or same or (node not in steps and any(map(leads, node.users)))

    for user in list(source.users):
        if user is not rounded and leads(user):
            user.replace_input_with(source, rounded)


@dataclasses.dataclass(frozen=True, eq=False)
class Shadow:
    """The Keras side of a compressed torch module.

    Attributes:
        model: the `CompressedModel`.
        original: `torch.fx.GraphModule`: a plain module of the shapes and the graph of the
            compressed one, in evaluation mode.
        teacher: the module before compression, in evaluation mode.
        weights: {(layer of the model, its weight): `TorchWeight`}.
        tensors, nodes: those of `Converted`, for the nodes of `original`.
        examples: tuple of inputs that the module can be called on.
        hooks: handles of the hooks that move the algorithms along, at most one.
    """

    model: object
    original: torch.fx.GraphModule
    teacher: torch.fx.GraphModule
    weights: dict
    tensors: dict
    nodes: dict
    examples: tuple
    hooks: list = dataclasses.field(default_factory=list)

    def attach(self, module):
        """Let a copy of `original` compute with the transforms of the shadow, in place.

        The module gets the values that the shadow has: adapted statistics of batch norms.
        """
        for key, weight in self.present():
            variable, tensor = self.variable(*key), raw_tensor(module, weight)
            with torch.no_grad():
                tensor.copy_(weight.to_torch(variable.value, tensor.shape))
            layer = self.model.get_layer(key[0])
            if isinstance(layer, CompressedLayer) and key[1] in layer.weight_names:
                for transform in layer.transforms_of(key[1]):
                    owner = module.get_submodule(weight.path)
                    attached = Transformed(transform, weight).train(owner.training)
                    parametrize.register_parametrization(owner, weight.name, attached, unsafe=True)
                if isinstance(owner, torch.nn.RNNBase):
                    owner.register_forward_pre_hook(_read_anew)

        def on_edge(node):
            fixed = functools.partial(fixed_quantizer, node)
            return Transformed(node.op.quantizer, fixed=fixed).train(module.training)

        insert_quantizers(module, self, on_edge)
        module.shadow = self
        self.share(module)
        return module

    def present(self):
        """Return the pairs of `weights` whose layer the model has."""
        layers = {layer.name for layer in self.model.layers}
        return [(key, weight) for key, weight in self.weights.items() if key[0] in layers]

    def variable(self, name, weight):
        """Return the variable of a layer: the raw one where it is read through transforms."""
        layer = self.model.get_layer(name)
        if isinstance(layer, CompressedLayer) and weight in layer.weight_names:
            return layer.raw_weight(weight)
        return getattr(getattr(layer, "cell", layer), weight)

    def device(self, module):
        """Return the device that the module is on."""
        tensors = [*module.parameters(), *module.buffers(), *self.examples]
        return tensors[0].device

    def share(self, module):
        """Let the shadow's variables be views of the weights that the module holds now."""
        for key, weight in self.present():
            raw = raw_tensor(module, weight).detach()
            self.variable(*key).value.data = weight.to_keras(raw)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "Expected a module that can be copied. Received: a compressed one, which shares its "
            "state with a Keras model. Save `module.state_dict()` and "
            "`Compression.state_dict()`, and load them into what `compress_model` returns; or copy "
            "the module of `keras_compress.torch.strip`"
        )


def _read_anew(module, inputs):
    """Let a recurrent module compute with its weights as they are: it keeps a list of them."""
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def raw_tensor(module, weight):
    """Return the trained tensor of a `TorchWeight`: what the optimizer sees."""
    owner = module.get_submodule(weight.path)
    if parametrize.is_parametrized(owner, weight.name):
        return owner.parametrizations[weight.name].original
    return getattr(owner, weight.name)


def copy_effective(module, plain):
    """Give a plain module the weights and buffers that a compressed one computes with.

    One weight in two places is rounded in each by itself: they are two weights in the plain module.
    """
    was_training = module.training
    module.eval()
    for name, parameter in list(plain.named_parameters(remove_duplicate=False)):
        value = effective(module, name)
        parameter = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        path, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(path), attribute, parameter)
    for name, buffer in plain.named_buffers():
        buffer.data = effective(module, name)
    module.train(was_training)


def effective(module, name):
    """Return a copy of a weight or buffer as the module computes with it."""
    path, _, attribute = name.rpartition(".")
    with torch.no_grad():
        return getattr(module.get_submodule(path), attribute).detach().clone()
