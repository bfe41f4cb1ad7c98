"""Stripped and shrunk torch modules compute what the compressed ones do."""

import copy

import numpy as np
import pytest
from backend_helpers import BACKEND

import keras_compress as kc

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_training import (
    CLASSES,
    CONFIGURATIONS,
    PRUNING,
    QUANTIZATION,
    config_of,
    images,
    in_evaluation,
    network,
    train,
    trained,
)

import keras_compress.torch as kct


@pytest.fixture
def module():
    return network()


@pytest.mark.parametrize("algorithms", list(CONFIGURATIONS.values())[:5], ids=[*CONFIGURATIONS][:5])
def test_stripped_module_is_plain_and_computes_the_same(module, algorithms):
    module, _ = trained(module, *algorithms)
    plain = kct.strip(module)
    for each in plain.modules():
        known = type(each) in (kct.FakeQuantize, type(plain))
        assert known or type(each).__module__.startswith("torch.nn.")
        assert not torch.nn.utils.parametrize.is_parametrized(each)
    assert not hasattr(plain, "shadow") and not plain.training
    rounds = any(isinstance(each, kct.FakeQuantize) for each in plain.modules())
    assert rounds == any(each["algorithm"] == "quantization" for each in algorithms)
    assert torch.equal(plain(images(seed=5)), in_evaluation(module))
    copy.deepcopy(plain)


def test_stripped_grids_hold_the_numbers_of_the_quantizers():
    values = torch.linspace(-3, 3, 1001)
    grids = [
        kc.quantizers.SymmetricQuantizer(8),
        kc.quantizers.SymmetricQuantizer(4),
        kc.quantizers.SymmetricQuantizer(8, signed=False),
        kc.quantizers.SymmetricQuantizer(3, signed=False),
        kc.quantizers.AsymmetricQuantizer(8),
        kc.quantizers.AsymmetricQuantizer(2),
    ]
    for quantizer in grids:
        quantizer.build((1001,))
        quantizer.set_range(0.0 if quantizer.signed is False else -0.7, 1.3)
        plain = kct.FakeQuantize(quantizer)(values)
        step = float(quantizer.step())
        difference = (plain - quantizer(values)).abs()
        # A value in the middle of two levels goes up there, and to the even one in torch.
        middle = ((values / step - 0.5) - (values / step - 0.5).round()).abs() < 1e-3
        assert difference[~middle].max() <= 1e-6
        assert difference.max() <= 1.001 * step


def test_stripped_grids_per_channel():
    quantizer = kc.quantizers.AsymmetricQuantizer(8, axis=(-3,))
    quantizer.build((None, 3, 8, 8))
    low, high = np.array([-1.0, -0.5, 0.0]), np.array([1.0, 2.0, 3.0])
    quantizer.set_range(low.reshape(1, 3, 1, 1), high.reshape(1, 3, 1, 1))
    difference = kct.FakeQuantize(quantizer)(images()) - quantizer(images())
    assert difference.abs().max() <= 1e-6


def test_shrunk_module_computes_what_the_masked_one_does(module):
    module, _ = trained(module, PRUNING, QUANTIZATION)
    small = kct.shrink(module)
    assert (small.stem.out_channels, small.block.norm.num_features) == (4, 4)
    assert (small.depthwise.groups, small.depthwise.in_channels) == (4, 4)
    assert (small.head.in_features, small.head.out_features) == (6, CLASSES)
    assert small.block.conv.weight.shape == (4, 4, 3, 3)
    expected = in_evaluation(module)
    assert (in_evaluation(small) - expected).abs().max() <= 1e-6
    assert torch.equal(kct.strip(small)(images(seed=5)), in_evaluation(small))
    compression = kct.Compression(small, 2)
    train(small, compression, torch.optim.SGD(small.parameters(), lr=0.05), 3)
    assert compression.statistics()["pruning_level"] == pytest.approx(0.5)


class Reshaped(torch.nn.Module):
    """Depthwise with a multiplier, concatenation, and sizes written out."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.left = torch.nn.Conv2d(3, 4, 1)
        self.right = torch.nn.Conv2d(3, 4, 1)
        self.twice = torch.nn.Conv2d(8, 16, 3, groups=8)
        self.up = torch.nn.ConvTranspose2d(16, 4, 2)
        self.head = torch.nn.Linear(4 * 49, CLASSES)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(torch.relu(self.up(self.twice(x))).view(self.sizes))


@pytest.mark.parametrize("sizes", [(-1, 196), (-1, 4 * 49)])
def test_shrunk_sizes_of_reshapes_and_groups(sizes):
    torch.manual_seed(0)
    module, _ = trained(Reshaped(sizes), PRUNING, QUANTIZATION)
    small = kct.shrink(module)
    assert small.head.in_features < module.head.in_features
    assert small.up.out_channels == 2
    assert small.twice.out_channels == 2 * small.twice.groups < 16
    assert (in_evaluation(small) - in_evaluation(module)).abs().max() <= 1e-6


def test_a_module_without_weights():
    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.mT, -1) @ x

    x = torch.randn(4, 3, 5)
    module = kct.compress_model(Attention(), config_of(QUANTIZATION), x, data=[x])
    plain = kct.strip(module)
    assert sum(isinstance(each, kct.FakeQuantize) for each in plain.modules()) == 2
    assert torch.equal(plain(x), in_evaluation(module, x))


def test_ranges_that_change_in_evaluation_mode_are_seen(module):
    module = trained(module, QUANTIZATION)[0].eval()
    before = in_evaluation(module)
    quantizer = module.get_submodule("first-fake_quantize")
    with torch.no_grad():
        quantizer.scale.mul_(0.5)
    after = in_evaluation(module)
    assert not torch.equal(after, before)
    assert torch.equal(kct.strip(module)(images(seed=5)), after)
    state = module.state_dict()
    state["first-fake_quantize.scale"] = state["first-fake_quantize.scale"] * 2
    module.load_state_dict(state)
    assert torch.equal(in_evaluation(module), before)
