"""Compressed torch modules in training: the numbers of Keras, bit for bit after a pause."""

import copy
import io
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND

import keras_compress as kc

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_training import (
    CONFIGURATIONS,
    DISTILLATION,
    PRUNING,
    QUANTIZATION,
    RB,
    SAMPLES,
    TAYLOR,
    compressed,
    config_of,
    copy_to_keras,
    images,
    in_evaluation,
    keras_network,
    labels,
    network,
    states,
    train,
    trained,
)

import keras_compress.torch as kct
from keras_compress.model_facts import quantizers_of


@pytest.fixture
def module():
    return network()


@pytest.mark.parametrize("algorithms", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("data", [True, False], ids=["calibrated", "from training"])
def test_same_numbers_as_in_keras(module, algorithms, data):
    twin = copy_to_keras(module, keras_network())
    x = images().permute(0, 2, 3, 1).numpy()
    config = config_of(*algorithms)
    twin = kc.compress_model(twin, config, data=[x] if data else None, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    twin.compile(keras.optimizers.SGD(0.05), loss)
    callbacks = [kc.callbacks.Compress()]
    batches = (np.tile(x, (5, 1, 1, 1)), np.tile(labels().numpy(), 5))
    twin.fit(*batches, batch_size=SAMPLES, epochs=4, shuffle=False, callbacks=callbacks, verbose=0)
    module, compression = trained(module, *algorithms, steps=20, steps_per_epoch=5, data=data)

    expected, received = states(twin), states(module.shadow.model)
    assert received.keys() == expected.keys()
    masks = [key for key in expected if "mask" in key]
    for key, value in expected.items():
        assert np.allclose(received[key], value, rtol=1e-3, atol=1e-5), key
    for key in masks:
        assert np.array_equal(received[key], expected[key]), key
    assert any(not expected[key].all() for key in masks) == bool(masks)
    figures = {k: v for each in twin.config.algorithms for k, v in each.statistics(twin).items()}
    assert compression.statistics() == pytest.approx(figures)
    for layer in filter(lambda layer: layer.weights, twin.layers):
        for own, other in zip(
            layer.get_weights(),
            module.shadow.model.get_layer(layer.name).get_weights(),
            strict=True,
        ):
            assert np.abs(own.astype(float) - other).max() <= 1e-4, layer.name
    outputs = in_evaluation(module, images()).numpy()
    difference = np.abs(outputs - twin(x, training=False).detach().numpy())
    # Sums in another order differ in the last bit. Where that is between two levels of an
    # activation, a sample differs by a step.
    assert np.quantile(difference, 0.75) <= 1e-4
    assert difference.max() <= 0.01


def test_shadow_computes_what_the_module_does(module):
    module, compression = trained(module, PRUNING, QUANTIZATION)
    compression.statistics()  # shares the weights anew
    x = images(seed=5)
    expected = module.shadow.model(x, training=False)
    assert torch.equal(in_evaluation(module, x), expected)


def test_the_users_module_is_left_alone(module):
    module.train()
    before = copy.deepcopy(module.state_dict())
    trained(module, PRUNING, QUANTIZATION, DISTILLATION)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training and not hasattr(module.stem, "parametrizations")


def test_state_dict_holds_everything_under_names_that_stay(module):
    names = list(compressed(module, PRUNING, RB, QUANTIZATION).state_dict())
    assert names == list(compressed(module, PRUNING, RB, QUANTIZATION).state_dict())
    wanted = "stem.parametrizations.weight.original", "block.norm.running_mean", "head.bias"
    assert set(wanted) <= set(names)
    assert sum(name.endswith("scale") for name in names) == 5 + 6
    assert all("/" not in name for name in names)


def test_parameters_are_weights_and_ranges_and_ranges_do_not_decay(module):
    module = compressed(module, TAYLOR, QUANTIZATION)
    decayed, kept = kct.parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    kept = {names[id(parameter)].rpartition(".")[2] for parameter in kept["params"]}
    assert kept == {"scale", "score"}
    decayed = [names[id(parameter)] for parameter in decayed["params"]]
    assert not any(name.endswith(("scale", "score")) for name in decayed)
    assert "stem.parametrizations.weight.original" in decayed


@pytest.mark.parametrize("algorithms", [(PRUNING, QUANTIZATION), (RB, QUANTIZATION)])
@pytest.mark.parametrize("data", [True, False], ids=["calibrated", "from training"])
def test_training_goes_on_from_a_file_bit_for_bit(module, algorithms, data):
    def prepared():
        each = compressed(module, *algorithms, data=data)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9)
        return each, kct.Compression(each, 3), optimizer

    straight, compression, optimizer = prepared()
    train(straight, compression, optimizer, 5)
    parts = [straight, compression, optimizer]
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    train(*parts, 5)

    file.seek(0)
    resumed = prepared()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 5)
    expected, received = straight.state_dict(), resumed[0].state_dict()
    for name, value in expected.items():
        same = torch.equal(received[name], value) if torch.is_tensor(value) else None
        assert received[name] == value if same is None else same, name
    assert resumed[1].state_dict() == compression.state_dict()
    assert torch.equal(in_evaluation(straight), in_evaluation(resumed[0]))


def test_the_length_of_an_epoch_may_come_from_the_first_one(module):
    module, compression = trained(module, PRUNING, steps=3, steps_per_epoch=None)
    assert compression.statistics()["pruning_level"] == 0
    compression.epoch_end()
    assert compression.steps_per_epoch == 3
    train(module, compression, torch.optim.SGD(module.parameters(), lr=0.05), 1)
    assert compression.statistics()["pruning_level"] == 0.5


def test_a_later_compression_takes_the_place_of_an_earlier_one(module):
    module, first = trained(module, PRUNING, steps=1)
    second = kct.Compression(module, 1)
    train(module, second, torch.optim.SGD(module.parameters(), lr=0.05), 1)
    assert (first.steps, second.steps) == (1, 1)
    assert len(module.shadow.hooks) == 1


def test_finish_sets_ranges_from_the_samples_so_far(module):
    module, compression = trained(module, QUANTIZATION, steps=1, data=False)
    assert not all(each.calibrated for each in quantizers_of(module.shadow.model))
    compression.finish()
    assert all(each.calibrated for each in quantizers_of(module.shadow.model))


# Whole programs

IN_PARALLEL = """
import sys, torch, torch.distributed as distributed
import keras_compress.torch as kct

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(),
    torch.nn.Linear(128, 4),
)
x = torch.randn(8, 3, 8, 8)
params = {"pruning_target": 0.5, "round_to": 1, "prune_first_conv": True, "pruning_steps": 2}
pruning = {"algorithm": "filter_pruning", "params": params}
config = {"compression": [pruning, {"algorithm": "quantization"}]}
module = torch.nn.parallel.DistributedDataParallel(kct.compress_model(module, config, x, data=[x]))
compression = kct.Compression(module, steps_per_epoch=2)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
torch.manual_seed(rank + 1)
for _ in range(6):
    optimizer.zero_grad()
    x = torch.randn(8, 3, 8, 8)
    outputs = module(x)
    (outputs.square().mean() + compression.loss(x, outputs)).backward()
    optimizer.step()
    compression.step()
torch.save((compression.statistics()["pruning_level"], module.state_dict()), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_have_the_same_masks_and_ranges(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", IN_PARALLEL]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert parts[0][0] == parts[1][0] == 0.5
    for name, value in parts[0][1].items():
        other = parts[1][1][name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
