"""Modules that are taken apart are trained in 8 bits and stripped like all others."""

import keras
import pytest
from backend_helpers import BACKEND

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_composites import ATTENTION, RECURRENT
from torch_networks import images, made_of, randomized

import keras_compress.torch as kct
from keras_compress.torch.convert import convert

INT8 = {
    "compression": {
        "algorithm": "quantization",
        "initializer": {
            "range": {"type": "min_max"},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
        },
    }
}


@pytest.fixture(params=RECURRENT | ATTENTION)
def trained(request):
    """(module in training mode, compressed module after two steps in evaluation mode, inputs)."""
    torch.manual_seed(0)
    make, inputs = (RECURRENT | ATTENTION)[request.param]
    module, x = randomized(make()).train(), inputs(4)
    x = x if isinstance(x, tuple) else (x,)
    compressed = kct.compress_model(module, INT8, x, data=[(x if len(x) > 1 else x[0], None)])
    compression = kct.Compression(compressed, steps_per_epoch=2)
    optimizer = torch.optim.SGD(compressed.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(each.square().mean() for each in outputs_of(compressed, x)).backward()
        optimizer.step()
        compression.step()
    return module, compressed.eval(), x


def outputs_of(module, inputs):
    return keras.tree.flatten(module(*inputs))


def test_int8(trained):
    module, compressed, x = trained
    weights = [each for each in compressed.parameters() if each.requires_grad]
    assert all(each.isfinite().all() for each in weights)
    with torch.no_grad():
        expected, received = outputs_of(compressed, x), outputs_of(kct.strip(compressed), x)
        floats = outputs_of(module.eval(), x)
    for one, other, exact in zip(received, expected, floats, strict=True):
        scale = other.abs().max().item()
        assert scale > 0.01
        # Few values lie between two levels, where torch rounds to the even one.
        assert (one - other).abs().quantile(0.9).item() <= 1e-5 * scale
        assert 0 < (other - exact).abs().max().item() <= 0.3 * exact.abs().max().item()


def test_settings_can_be_read_where_modules_are_taken_apart():
    def forward(self, x):
        return self.inner(x)[0] * self.inner.hidden_size * self.inner.num_layers

    module = made_of(forward, inner=torch.nn.GRU(4, 3, 2, batch_first=True)).eval()
    x = images(2, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(convert(module, x).model(x), module(x), rtol=0, atol=1e-5)
