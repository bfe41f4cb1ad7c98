"""A torch module and its Keras shadow: the same results, weights, tensors and names."""

import copy
import io
import re

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy

if BACKEND != "torch":
    pytest.skip("modules of PyTorch are read on Keras' torch backend", allow_module_level=True)

import torch
import torch.nn.functional as F
from torch import nn
from torch_composites import COMPOSITES
from torch_networks import NETWORKS, ResNet18, each_of, images, made_of, randomized, tokens

from keras_compress.graph.trace import trace
from keras_compress.torch.convert import TorchWeight, convert
from keras_compress.torch.operations import ConversionError

RECURRENT = keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN


def made(name):
    """Return (module in evaluation mode, function of a batch size that makes a tuple of inputs)."""
    torch.manual_seed(0)
    make, inputs = (NETWORKS | COMPOSITES)[name]

    def batch(size):
        found = inputs(size)
        return found if isinstance(found, tuple) else (found,)

    return randomized(make()).eval(), batch


def called(model, inputs):
    return keras.tree.flatten(model(list(inputs) if len(inputs) > 1 else inputs[0]))


@pytest.fixture(params=NETWORKS | COMPOSITES)
def case(request):
    module, batch = made(request.param)
    return module, batch, convert(module, batch(2))


def test_everything_is_the_same(case):
    module, batch, converted = case
    with torch.no_grad():
        for size in (1, 5):
            inputs = batch(size)
            expected = keras.tree.flatten(module(*inputs))
            for results in (
                called(converted.model, inputs),
                keras.tree.flatten(converted.graph.eval()(*inputs)),
            ):
                for one, other in zip(results, expected, strict=True):
                    check_equal(one, other)
    check_weights(module, converted)
    check_tensors(batch(3), converted)
    check_names(module, converted)


def check_equal(one, other, name=""):
    """Equal within 1e-5 of the largest finite number."""
    finite = other[other.isfinite()].double().abs()
    scale = max(finite.max().item(), 1e-3)
    same = {"check_dtype": other.is_floating_point(), "msg": name or None}  # indices: of 32 bits
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale, **same)


def check_weights(module, converted):
    """Each weight of the shadow is a weight of the module, permuted; none is missing."""
    layers = {layer.name: layer for layer in converted.model.layers}
    reached = []
    for (name, attribute), weight in converted.weights.items():
        layer = layers[name]
        variable = getattr(getattr(layer, "cell", layer), attribute)
        tensor = getattr(converted.graph.get_submodule(weight.path), weight.name).detach()
        expected = tensor.numpy()
        if weight.blocks is not None:
            expected = np.concatenate([np.split(expected, 3)[i] for i in weight.blocks])
        expected = np.transpose(expected, weight.axes)
        expected = expected if weight.shape is None else expected.reshape(weight.shape)
        np.testing.assert_array_equal(numpy(variable), expected)
        back = weight.to_torch(weight.to_keras(tensor), tensor.shape)
        np.testing.assert_array_equal(back.numpy(), tensor.numpy())
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        path = f"{weight.path}.{weight.name}".lstrip(".")
        if path in own:
            np.testing.assert_array_equal(tensor.numpy(), own[path].detach().numpy())
        reached.append(id(variable))
    cells = [layer.cell for layer in layers.values() if isinstance(layer, RECURRENT)]
    biases = [id(cell.bias) for cell in cells if cell.bias is not None]
    seeds = [id(v) for v in converted.model.variables if "seed" in v.name]
    assert sorted(reached + biases + seeds) == sorted(map(id, converted.model.variables))


def check_tensors(inputs, converted):
    """Each named tensor of the shadow has the values of the fx node; all but padding is named."""
    graph = trace(converted.model)
    expected = {}
    interpreter = torch.fx.Interpreter(converted.graph.eval())
    run_node = interpreter.run_node

    def noted(node):  # a copy: the next node may write into it
        value = run_node(node)
        expected[node.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value

    interpreter.run_node = noted
    with torch.no_grad():
        interpreter.run(*(each.clone() for each in inputs))
        values = graph.run(list(inputs), lambda node, *args, **kwargs: node.op(*args, **kwargs))
    nodes = {node.name for node in converted.graph.graph.nodes}
    for edge, value in values.items():
        if edge.name in converted.tensors:
            whole = expected[converted.tensors[edge.name]]
            check_equal(value.expand_as(whole), whole, edge.name)  # constants: of one sample
        else:
            own = edge.producer
            is_part = re.search(r"-(pad|crop|state|weight|alpha|indices)(_\d+)?$", own.name)
            is_cropped = f"{own.name}-crop" in converted.nodes
            assert is_part or is_cropped or len(own.outputs) > 1, edge.name
    operations = {operation.name for operation in converted.model.operations}
    assert operations <= set(converted.nodes)
    assert set(converted.nodes.values()) <= nodes


def check_names(module, converted):
    """Layers with weights are called as their modules."""
    paths = {path.replace(".", "-") for path, _ in converted.graph.named_modules()}
    held = {name.replace(".", "-") for name, _ in converted.graph.named_parameters()}
    held |= {name.replace(".", "-") for name, _ in converted.graph.named_buffers()}
    for layer in converted.model.layers:
        if layer.weights and not layer.name.endswith("-weight"):
            assert layer.name in paths | held


def test_names_of_a_resnet():
    module, batch = made("ResNet-18")
    converted = convert(module, batch(2))
    names = {layer.name for layer in converted.model.layers}
    convolutions = {
        path.replace(".", "-")
        for path, each in module.named_modules()
        if isinstance(each, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    }
    assert len(convolutions) == 41
    assert convolutions <= names
    weight = converted.weights["layer2-0-downsample-0", "kernel"]
    assert weight == TorchWeight("layer2.0.downsample.0", "weight", (2, 3, 1, 0))
    assert converted.tensors["layer2-0-relu_1"] == "layer2_0_relu_1"
    assert converted.nodes["layer2-0-conv1-pad"] == "layer2_0_conv1"
    assert converted.model.input_shape == (None, 3, 32, 32)
    roles = {node.name: node.role.value for node in trace(converted.model).nodes}
    assert roles["layer1-0-conv1"] == "weighted"
    assert roles["bn1"] == "normalization"
    assert roles["layer1-0-relu"] == "activation"
    assert roles["add"] == "arithmetic"


def test_layers_that_stand_for_modules():
    module, batch = made("depthwise")
    layer = convert(module, batch(2)).model.get_layer("0")
    assert isinstance(layer, keras.layers.DepthwiseConv2D)
    assert tuple(layer.kernel.shape) == (3, 3, 4, 2)
    module, batch = made("3d")
    layer = convert(module, batch(2)).model.get_layer("1")
    assert layer.momentum == pytest.approx(0.7)
    assert layer.epsilon == 1e-3
    np.testing.assert_array_equal(numpy(layer.moving_mean), module[1].running_mean.numpy())
    np.testing.assert_array_equal(numpy(layer.moving_variance), module[1].running_var.numpy())


def test_padding_that_keras_can_say_needs_no_operation():
    module = each_of(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    names = [op.name for op in convert(module, images(2, 3, 9, 9)).model.operations]
    assert names[1:] == ["0", "1"]
    names = [op.name for op in convert(module, images(2, 3, 8, 8)).model.operations]
    assert names[1:] == ["0", "1-pad", "1"]


def test_attention_is_taken_apart_in_both():
    module, batch = made("ViT")
    converted = convert(module, batch(2))
    assert ("blocks-0-attn-query", "kernel") in converted.weights
    targets = [node.target for node in converted.graph.graph.nodes]
    assert not [x for x in converted.graph.modules() if isinstance(x, nn.MultiheadAttention)]
    assert targets.count(torch.matmul) == 4
    weight = converted.weights["blocks-1-attn-value", "kernel"]
    assert weight.path == "blocks.1.attn.value"
    expected = module.blocks[1].attn.in_proj_weight.detach().chunk(3)[2].T
    found = converted.model.get_layer("blocks-1-attn-value").kernel
    np.testing.assert_array_equal(numpy(found), expected.numpy())
    token = converted.weights["class_token", "value"]
    assert (token.path, token.name) == ("", "class_token")


def test_positions_are_a_tensor_of_both():
    module, batch = made("language")
    converted = convert(module, batch(2))
    assert converted.tensors["positions-weight"] == "positions_weight"
    weight = converted.weights["positions-weight", "value"]
    assert (weight.path, weight.name) == ("positions", "weight")


def test_the_graph_is_saved_without_what_traced_it():
    module, batch = made("masks")
    graph = convert(module, batch(2)).graph.eval()
    file = io.BytesIO()
    torch.save(graph, file)
    assert b"decompose" not in file.getvalue()
    file.seek(0)
    inputs = batch(3)
    for one, other in zip(
        torch.load(file, weights_only=False)(*inputs), graph(*inputs), strict=True
    ):
        assert torch.equal(one, other)


def test_the_module_stays_as_it_is():
    module, batch = made("ViT")
    module.train()
    module.blocks[0].mlp.eval()
    before = copy.deepcopy(module.state_dict())
    converted = convert(module, batch(2))
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert isinstance(module.blocks[0].attn, nn.MultiheadAttention)
    assert module.training
    assert not module.blocks[0].mlp.training
    assert converted.graph.training
    assert converted.graph.get_submodule("blocks.1.mlp").training
    assert not converted.graph.get_submodule("blocks.0.mlp").training
    parameters = {id(each) for each in module.parameters()}
    assert not parameters & {id(each) for each in converted.graph.parameters()}


def test_the_graph_drops_in_training_as_the_module_does():
    module, batch = made("functional")
    graph = convert(module.train(), batch(2)).graph
    dropouts = [each for each in graph.modules() if isinstance(each, nn.Dropout)]
    assert [each.p for each in dropouts] == [0.3]
    inputs = batch(64)
    assert not torch.equal(graph(*inputs), graph(*inputs))
    graph.eval()
    assert torch.equal(graph(*inputs), graph(*inputs))


def test_gradients_of_the_shadow_are_those_of_the_module():
    module, batch = made("grouped")
    converted = convert(module, batch(2))
    inputs = batch(3)
    module(*inputs).square().sum().backward()
    called(converted.model, inputs)[0].square().sum().backward()
    for (name, attribute), weight in converted.weights.items():
        variable = getattr(converted.model.get_layer(name), attribute)
        tensor = getattr(module.get_submodule(weight.path), weight.name)
        torch.testing.assert_close(
            variable.value.grad, weight.to_keras(tensor.grad), rtol=1e-4, atol=1e-4
        )


def test_the_example_inputs_stay_as_they_are():
    module = made_of(
        lambda self, x: self.relu(self.fc(x)) + x, fc=nn.Linear(4, 4), relu=nn.ReLU(True)
    )
    inputs = images(3, 4)
    before = inputs.clone()
    convert(module, inputs)
    assert torch.equal(inputs, before)


# Errors


class OfUser(torch.nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).abs() + torch.erfinv(x)


def recurrent(**options):
    return made_of(lambda self, x: self.inner(x)[0], inner=nn.LSTM(4, 4, **options))


def from_ones(self, x):
    ones = torch.ones(1, x.shape[0], 4)
    return self.inner(x, ones)[0]


REFUSED = {
    "unknown function": (
        lambda: made_of(lambda self, x: self.block(x), block=OfUser()),
        images(2, 4),
        r"counterpart in Keras.*'fft_fft' \(call_function of fft_fft\) in module 'block'.*erfinv",
    ),
    "unknown module": (
        lambda: made_of(lambda self, x: self.form(x, x), form=nn.Bilinear(4, 4, 3)),
        images(2, 4),
        "counterpart in Keras.*'bilinear' .call_function of bilinear. in module 'form'",
    ),
    "unknown layer": (
        lambda: each_of(nn.Linear(4, 4), nn.LocalResponseNorm(2)),
        images(2, 4, 4),
        r"node 'local_response_norm' \(call_function of local_response_norm\) in module '1'",
    ),
    "control flow": (
        lambda: made_of(lambda self, x: x if x.sum() > 0 else -x),
        images(2, 4),
        r"do not depend on the values of its tensors.*TraceError",
    ),
    "in place": (
        lambda: made_of(lambda self, x: (lambda y: self.relu(y) + y)(x * 2), relu=nn.ReLU(True)),
        images(2, 4),
        r"its Keras counterpart repeats.*inplace=True.*differ by",
    ),
    "wrong shape": (
        lambda: each_of(nn.Linear(5, 4)),
        images(2, 4),
        "can be called on its example inputs",
    ),
    "fixed batch": (
        lambda: made_of(lambda self, x: x.view(2, 8)),
        images(2, 2, 4),
        "one sample more",
    ),
    "no tensor": (
        lambda: made_of(lambda self, x: (x, x.shape[1])),
        images(2, 4),
        "results that are tensors.*Received: 4",
    ),
    "constant": (
        lambda: made_of(
            lambda self, x: x + self.fc(torch.ones(1, 4, device=x.device)), fc=nn.Linear(4, 4)
        ),
        images(2, 4),
        "an input in every step.*node 'fc'",
    ),
    "always dropping": (
        lambda: made_of(lambda self, x: F.dropout(x)),
        images(2, 4),
        "dropout that ends with training.*training=True",
    ),
    "two free axes": (
        lambda: made_of(lambda self, x: torch.einsum("ai,bi->ab", x, x).unsqueeze(0)),
        images(2, 4),
        "one axis that depends on the size of the batch.*'unsqueeze'",
    ),
    "size of the batch": (
        lambda: made_of(lambda self, x: x * x.shape[0]),
        images(2, 4),
        "arguments that the operation takes in Keras.*'mul'",
    ),
    "strides and dilation": (
        lambda: each_of(nn.Conv2d(3, 3, 3, stride=2, dilation=2)),
        images(2, 3, 9, 9),
        r"either strides or dilation.*node '_0' \(call_module of Conv2d\) in module '0'",
    ),
    "grouped transposed": (
        lambda: each_of(nn.ConvTranspose2d(4, 4, 3, groups=2)),
        images(2, 4, 5, 5),
        "`groups=1`",
    ),
    "transposed too long": (
        lambda: each_of(nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)),
        images(2, 4, 5, 5),
        "`output_padding` is at most its `padding`",
    ),
    "norm of embeddings": (
        lambda: each_of(nn.Embedding(10, 4, max_norm=1.0)),
        tokens(2, 4),
        "without `max_norm`",
    ),
    "no running statistics": (
        lambda: each_of(nn.BatchNorm1d(4, track_running_stats=False)),
        images(2, 4),
        "running statistics",
    ),
    "no momentum": (
        lambda: each_of(nn.BatchNorm1d(4, momentum=None)),
        images(2, 4),
        "with a `momentum`",
    ),
    "dilated pooling": (
        lambda: each_of(nn.MaxPool2d(2, dilation=2)),
        images(2, 3, 5, 5),
        "pooling without dilation",
    ),
    "enlarged by a half": (
        lambda: each_of(nn.Upsample(scale_factor=1.5)),
        images(2, 3, 4, 4),
        "enlarged a whole number of times",
    ),
    "rounded division": (
        lambda: made_of(lambda self, x: torch.div(x, 2, rounding_mode="floor")),
        images(2, 4),
        "arguments that the operation takes in Keras.*rounding_mode",
    ),
    "number from data": (
        lambda: made_of(lambda self, x: x / x.abs().max().item()),
        images(2, 4),
        r"counterpart in Keras.*'item' \(call_method of item\)",
    ),
    "random": (
        lambda: made_of(lambda self, x: x + torch.rand(x.shape[1])),
        images(2, 4),
        "counterpart in Keras.*'rand'",
    ),
    "control by the batch": (
        lambda: made_of(lambda self, x: x if x.shape[0] > 2 else -x),
        images(2, 4),
        "do not depend on the values of its tensors.*TraceError",
    ),
    "constant result": (
        lambda: made_of(lambda self, x: (x, torch.zeros_like(x))),
        images(2, 4),
        "results that are tensors and depend on the inputs",
    ),
    "attribute of a tensor": (
        lambda: made_of(lambda self, x: x.real + x),
        images(2, 4),
        "no attribute of a tensor but its transpose.*'getattr_1'",
    ),
    "smaller state": (
        lambda: recurrent(batch_first=True, proj_size=2),
        images(2, 3, 4),
        "an `LSTM` without `proj_size`.*'inner'",
    ),
    "from ones": (
        lambda: made_of(from_ones, inner=nn.GRU(4, 4, batch_first=True)),
        images(2, 3, 4),
        "an input in every step.*'inner'",
    ),
    "added keys": (
        lambda: made_of(
            lambda self, x: self.inner(x, x, x)[0],
            inner=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True),
        ),
        images(2, 3, 4),
        "without added keys.*add_bias_kv=True, add_zero_attn=True",
    ),
    "other padding left out": (
        lambda: each_of(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        images(2, 3, 6, 6),
        "leaves out the padding of Keras'.*'_0'",
    ),
    "other divisor": (
        lambda: each_of(nn.AvgPool2d(2, divisor_override=3)),
        images(2, 3, 6, 6),
        "without `divisor_override`",
    ),
    "instances with running statistics": (
        lambda: each_of(nn.InstanceNorm2d(3, track_running_stats=True)),
        images(2, 3, 6, 6),
        "instance normalization without running statistics",
    ),
    "no weight": (
        lambda: each_of(nn.RMSNorm(4, elementwise_affine=False)),
        images(2, 4),
        "`RMSNorm` of one axis, with a weight",
    ),
    "sharp softplus": (lambda: each_of(nn.Softplus(2.0)), images(2, 4), "with `beta=1`"),
    "normalized by sums": (
        lambda: made_of(lambda self, x: F.normalize(x, 1)),
        images(2, 4),
        "`F.normalize` with p=2. Received: p=1",
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name):
    make, inputs, message = REFUSED[name]
    with pytest.raises(ConversionError, match=rf"(?s)Expected.*({message})"):
        convert(make(), inputs)


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match="Expected a `torch.nn.Module`. Received: module=3"):
        convert(3, images(2, 4))
    for inputs in (3, (), torch.tensor(1.0), (images(2, 4), images(3, 4))):
        with pytest.raises(TypeError, match="Expected a tensor, or a tuple of tensors"):
            convert(nn.Sequential(nn.Linear(4, 4)), inputs)


def test_a_conversion_error_is_a_value_error():
    assert issubclass(ConversionError, ValueError)
    assert ResNet18(blocks=(1,)).stages == 1
