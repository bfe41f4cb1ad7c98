"""ResNet-18, MobileNetV2 and vision transformers in torch: trained, pruned, sparse, exported."""

import numpy as np
import pytest
from backend_helpers import BACKEND

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import openvino as ov
import torch
from torch_networks import MobileNetV2, ResNet18, VisionTransformer, images, randomized

import keras_compress.torch as kct
from keras_compress.export.precisions import layer_precisions
from keras_compress.export.verify import compile_on_cpu

CLASSES, TRAINED_ON, COMPARED_ON = 5, 16, 64
NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
QUANTIZATION = {"algorithm": "quantization", "initializer": NO_ADAPTATION}
SPARSITY = 0.6
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": SPARSITY, "sparsity_target_epoch": 1},
}
# name: (function that makes the module, height of an image, layers that are not pruned because a
# normalization over their channels follows, or sizes that the module writes out)
NETWORKS = {
    "ResNet-18": (lambda: ResNet18(width=4), 32, []),
    "MobileNetV2": (lambda: MobileNetV2(width=8), 32, []),
    "ViT": (VisionTransformer, 16, ["{re}.*(conv_proj|attn-.*|mlp-3)$"]),
    "ViT, fused": (
        lambda: VisionTransformer(fused=True),
        16,
        ["{re}.*(conv_proj|attn-.*|mlp-3)$"],
    ),
}
LAYERS = {"ResNet-18": 21, "MobileNetV2": 26, "ViT": 14, "ViT, fused": 10}

every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name):
    """Return (module in training mode, batch of images)."""
    torch.manual_seed(0)
    make, size, _ = NETWORKS[name]
    return randomized(make()).train(), images(TRAINED_ON, 3, size, size)


def pruning(name):
    params = {"pruning_target": 0.5, "round_to": 1, "schedule": "baseline", "num_init_steps": 1}
    params |= {"prune_first_conv": True, "prune_downsample_convs": True}
    return {"algorithm": "filter_pruning", "params": params, "ignored_scopes": NETWORKS[name][2]}


def trained(name, *algorithms, steps=4):
    """Return (compressed module in evaluation mode, its `Compression`, images it has not seen)."""
    module, x = made(name)
    module = kct.compress_model(module, {"compression": list(algorithms)}, x[:2], data=[x])
    compression = kct.Compression(module, steps_per_epoch=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = module(x)
        loss = torch.nn.functional.cross_entropy(outputs, torch.arange(TRAINED_ON) % CLASSES)
        (loss + compression.loss(x, outputs)).backward()
        optimizer.step()
        compression.step()
    return module.eval(), compression, images(COMPARED_ON, *x.shape[1:])


def outputs_of(module, x):
    with torch.no_grad():
        return module(x).numpy()


def run_ir(path, x):
    """Return (outputs of an IR, the operations that it runs)."""
    compiled = compile_on_cpu(ov.Core(), path)
    return compiled(x.numpy())[0], layer_precisions(compiled)


def weighted(operations):
    return [each for each in operations if each.type in ("Convolution", "FullyConnected")]


def convolutions_and_linears(module):
    """Return how many there are, the three projections of an attention counted as three."""
    found = 0
    for each in module.modules():
        found += isinstance(each, (torch.nn.Conv2d, torch.nn.Linear))
        found += 3 * isinstance(each, torch.nn.MultiheadAttention)
    return found


def require_same(received, expected):
    """Compare the outputs of an IR with the module's.

    Both sum up floats in an order of their own. Where an activation lies between two levels in the
    last bit, they take different ones, and the sample moves by a step: few samples may.
    """
    difference = np.abs(received - expected).max(axis=1) / np.ptp(expected)
    assert np.quantile(difference, 0.9) <= 1e-6
    assert difference.mean() <= 1e-3
    assert difference.max() <= 0.05


@pytest.fixture(scope="module", params=NETWORKS)
def int8(request, tmp_path_factory):
    """(name, compressed module, images, its IR, the report of its export) of every network."""
    module, _, x = trained(request.param, QUANTIZATION)
    path = tmp_path_factory.mktemp("int8") / "model.xml"
    return request.param, module, x, path, kct.export(module, path)


def test_int8(int8):
    name, module, x, path, report = int8
    assert LAYERS[name] == convolutions_and_linears(made(name)[0])
    expected = outputs_of(module, x)
    assert np.ptp(expected) > 0.1
    assert np.array_equal(outputs_of(kct.strip(module), x), expected)
    received, operations = run_ir(path, x)
    require_same(received, expected)
    assert all(each.eight_bit for each in operations)
    assert len(weighted(operations)) == LAYERS[name]
    assert report.eight_bit_layers == len(report.layers) == len(operations)
    names = {layer.name for layer in module.shadow.model.layers}
    assert {each.layer for each in report.layers} <= names


def test_as_many_layers_in_8_bits_as_nncf(int8, tmp_path):
    nncf = pytest.importorskip(
        "nncf", reason="nncf, which this compares with, is not installed", exc_type=ImportError
    )
    name, _, x, path, _ = int8
    kct.export(made(name)[0], tmp_path / "float.xml", x[:2])
    model = ov.Core().read_model(tmp_path / "float.xml")
    quantized = nncf.quantize(model, nncf.Dataset([x.numpy()]), subset_size=1)
    ov.save_model(quantized, tmp_path / "nncf.xml")
    theirs, ours = (
        sum(each.eight_bit for each in weighted(run_ir(file, x)[1]))
        for file in (tmp_path / "nncf.xml", path)
    )
    assert ours >= theirs > 0


@every_network
def test_pruned_and_int8(name, tmp_path):
    module, compression, x = trained(name, pruning(name), QUANTIZATION)
    figures = compression.statistics()
    assert figures["pruning_level"] == pytest.approx(0.5, abs=0.02)
    small = kct.shrink(module).eval()
    sizes = [sum(p.numel() for p in kct.strip(each).parameters()) for each in (module, small)]
    assert sizes[1] < 0.85 * sizes[0]
    expected = outputs_of(module, x)
    assert np.abs(outputs_of(small, x) - expected).max() <= 1e-4 * np.ptp(expected)
    kct.export(small, tmp_path / "small.xml", verify=False)
    received, operations = run_ir(tmp_path / "small.xml", x)
    require_same(received, expected)
    assert all(each.eight_bit for each in operations)
    assert len(weighted(operations)) == LAYERS[name]


def test_heads_of_an_attention_are_removed():
    algorithm = pruning("ViT") | {"ignored_scopes": ["{re}.*(conv_proj|out_proj|mlp-3)$"]}
    module, _, x = trained("ViT", algorithm, QUANTIZATION)
    small = kct.shrink(module).eval()
    for index in range(2):
        attention = small.get_submodule(f"blocks.{index}.attn")
        sizes = [attention.get_submodule(part).out_features for part in ("query", "key", "value")]
        assert sizes == [8, 8, 8] and attention.get_submodule("out_proj").in_features == 8
    expected = outputs_of(module, x)
    assert np.abs(outputs_of(small, x) - expected).max() <= 1e-4 * np.ptp(expected)


@every_network
def test_sparsity_is_exact(name):
    module, compression, x = trained(name, MAGNITUDE)
    plain = kct.strip(module)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    weights = [each.weight.detach() for each in plain.modules() if isinstance(each, kinds)]
    assert len(weights) == LAYERS[name]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert abs(zeros - SPARSITY * total) < 1
    assert compression.statistics()["sparsity"] == pytest.approx(zeros / total, abs=1e-12)
    assert np.array_equal(outputs_of(plain, x), outputs_of(module, x))


@every_network
def test_sparse_and_int8(name, tmp_path):
    module, _, x = trained(name, MAGNITUDE, QUANTIZATION)
    path = tmp_path / "model.xml"
    kct.export(module, path, verify=False)
    received, operations = run_ir(path, x)
    require_same(received, outputs_of(module, x))
    assert all(each.eight_bit for each in operations)
    constants = [op for op in ov.Core().read_model(path).get_ops() if is_weight(op)]
    codes = np.concatenate([np.ravel(op.get_data()) for op in constants])
    assert len(constants) == LAYERS[name]
    assert (codes == 0).mean() >= SPARSITY - 1e-3  # and those that round to 0


def is_weight(op):
    """Whether an operation of an IR holds the integers of a convolution or a linear layer."""
    if op.get_type_name() != "Constant" or op.get_element_type() != ov.Type.i8:
        return False
    return len(op.get_output_shape(0)) >= 2
