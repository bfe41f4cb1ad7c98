"""What the torch adapter refuses."""

import copy
import dataclasses

import pytest
from backend_helpers import BACKEND

import keras_compress as kc

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_training import (
    DISTILLATION,
    PRUNING,
    QUANTIZATION,
    compressed,
    images,
    network,
    trained,
)

import keras_compress.torch as kct
from keras_compress.model_facts import transforms_of


@pytest.fixture
def module():
    return network()


def test_modules_that_are_not_compressed_are_refused(module):
    for function in (kct.strip, kct.shrink, kct.report, kct.Compression):
        with pytest.raises(TypeError, match="Expected a module made by.*Network"):
            function(module)


def test_wrong_arguments_of_export(module, tmp_path):
    with pytest.raises(ValueError, match="example_inputs=None"):
        kct.export(module, tmp_path / "model.xml")
    with pytest.raises(ValueError, match=r"'\.xml' \(OpenVINO IR\) or '\.onnx'"):
        kct.export(module, tmp_path / "model", images())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_wrong_number_of_steps(module, steps):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        kct.Compression(compressed(module, QUANTIZATION), steps)


def test_ranges_are_needed_before_strip(module):
    with pytest.raises(ValueError, match="without a range"):
        kct.strip(compressed(module, QUANTIZATION, data=False))


def test_a_rounded_tensor_without_a_counterpart(module):
    module = compressed(module, QUANTIZATION)
    module.shadow = dataclasses.replace(module.shadow, tensors={})
    with pytest.raises(ValueError, match="inside of a torch module only"):
        kct.strip(module)


def test_masks_are_needed_for_shrink(module):
    with pytest.raises(ValueError, match="Expected a model with masks"):
        kct.shrink(compressed(module, QUANTIZATION))


def test_compressed_modules_are_not_compressed_again(module):
    with pytest.raises(ValueError, match="not compressed yet"):
        compressed(compressed(module, QUANTIZATION), QUANTIZATION)


def test_inner_tensors_are_not_distilled(module):
    features = DISTILLATION | {"features": {"target_scopes": ["first"]}}
    with pytest.raises(kc.ConfigError, match="outputs alone"):
        compressed(module, features)


def test_channels_under_a_normalization_over_them_are_not_pruned():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.GroupNorm(8, 8), torch.nn.Conv2d(8, 4, 1)
    )
    with pytest.raises(kc.ConfigError, match="normalizes over"):
        compressed(module, PRUNING)


def test_grids_that_torch_has_no_operation_for():
    quantizer = kc.quantizers.SymmetricQuantizer(8, axis=(-2, -1))
    quantizer.build((3, 4))
    quantizer.set_range(0.0, 1.0)
    with pytest.raises(ValueError, match="equal steps, for the tensor or along one axis"):
        kct.FakeQuantize(quantizer)


def test_sizes_that_cannot_change():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.second(torch.nn.functional.layer_norm(self.first(x), (8, 8, 8)))

    with pytest.raises(ValueError, match="Expected"):
        kct.shrink(trained(Fixed(), PRUNING)[0])


def test_compressed_modules_are_not_copied_but_their_state_is(module):
    module = compressed(module, QUANTIZATION)
    with pytest.raises(TypeError, match="Save `module.state_dict"):
        copy.deepcopy(module)


def test_transforms_stay_out_of_sight_of_torch(module):
    module = compressed(module, PRUNING, QUANTIZATION)
    count = sum(len(each.variables) for each in transforms_of(module.shadow.model))
    own = [name for name, _ in module.named_parameters() if "parametrizations" not in name]
    assert not any("torch_params" in name for name, _ in module.named_parameters())
    assert count == sum(
        name.endswith(("scale", "mask_1", "mask_2", "mask_3"))
        for name, _ in module.named_parameters()
    )
    assert len(own) > 0
