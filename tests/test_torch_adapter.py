"""Compression of torch modules: the same numbers as for the same network in Keras."""

import copy
import dataclasses
import importlib.util
import io
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke

import keras_compress as kc

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch

import keras_compress.torch as kct
from keras_compress.binary_quantizers import BinaryActivations
from keras_compress.compressed_model import quantizers_of, transforms_of
from keras_compress.layers import FakeQuantize

SAMPLES, CLASSES = 16, 4
NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
QUANTIZATION = {"algorithm": "quantization", "initializer": NO_ADAPTATION}
LOW_BITS = QUANTIZATION | {"preset": "mixed", "weights": {"bits": 4}, "activations": {"bits": 4}}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {
        "pruning_target": 0.5,
        "round_to": 1,
        "schedule": "baseline",
        "num_init_steps": 1,
        "prune_first_conv": True,
    },
}
TAYLOR = PRUNING | {"params": PRUNING["params"] | {"filter_importance": "taylor"}}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 3},
}
RB = {"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2}}
DISTILLATION = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 3.0}


class Block(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


class Network(torch.nn.Module):
    """Residual, depthwise, pooled; `keras_network` is the same in Keras."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.first = torch.nn.ReLU()
        self.block = Block(8)
        self.pool = torch.nn.MaxPool2d(2)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = torch.nn.ReLU()
        self.wide = torch.nn.Conv2d(8, 12, 1)
        self.third = torch.nn.ReLU()
        self.average = torch.nn.AdaptiveAvgPool2d(1)
        self.flatten = torch.nn.Flatten()
        self.head = torch.nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.pool(self.block(self.first(self.stem(x))))
        x = self.third(self.wide(self.second(self.depthwise(x))))
        return self.head(self.flatten(self.average(x)))


def keras_network():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="x")
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = shortcut = layers.ReLU(name="first")(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="block-conv")(x)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="block-norm")(x)
    x = layers.ReLU(name="block-relu")(layers.Add(name="add")([x, shortcut]))
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.ReLU(name="second")(x)
    x = layers.Conv2D(12, 1, name="wide")(x)
    x = layers.ReLU(name="third")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="network")


def copy_to_keras(module, model):
    """Give a Keras network the weights of the torch one, by the rules of both libraries."""
    orders = {"depthwise": (2, 3, 0, 1), "head": (1, 0)}
    for layer in model.layers:
        if not layer.weights:
            continue
        twin = module.get_submodule(layer.name.replace("-", "."))
        if layer.name == "block-norm":
            values = [twin.weight, twin.bias, twin.running_mean, twin.running_var]
            layer.set_weights([value.detach().numpy() for value in values])
            continue
        kernel = twin.weight.detach().permute(orders.get(layer.name, (2, 3, 1, 0)))
        bias = [] if twin.bias is None else [twin.bias.detach().numpy()]
        layer.set_weights([kernel.numpy(), *bias])
    return model


def images(samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 8, 8, generator=generator)


def labels(samples=SAMPLES):
    return torch.arange(samples) % CLASSES


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Network()


def config_of(*algorithms):
    return {"target_device": "CPU", "compression": list(algorithms)}


def compressed(module, *algorithms, data=True):
    data = [images()] if data else None
    return kct.compress_model(module, config_of(*algorithms), images(), data=data)


def train(module, compression, optimizer, steps):
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = module(images())
        loss = torch.nn.functional.cross_entropy(outputs, labels())
        (loss + compression.loss(images(), outputs)).backward()
        optimizer.step()
        compression.step()


def trained(module, *algorithms, steps=8, steps_per_epoch=2, data=True):
    module = compressed(module, *algorithms, data=data)
    compression = kct.Compression(module, steps_per_epoch)
    train(module, compression, torch.optim.SGD(module.parameters(), lr=0.05), steps)
    return module, compression


def in_evaluation(module, inputs=None):
    with torch.no_grad():
        return module.eval()(images(seed=5) if inputs is None else inputs)


def states(model):
    """Return {layer and variable: values} of the quantizers and masks of a compressed model."""
    found = {}
    for layer in model.layers:
        transforms = [layer.quantizer] if isinstance(layer, FakeQuantize) else []
        for name in getattr(layer, "weight_names", ()):
            transforms += layer.transforms_of(name)
        for index, transform in enumerate(transforms):
            for variable in transform.weights:
                key = f"{layer.name}/{index}/{variable.name}"
                found[key] = keras.ops.convert_to_numpy(variable)
    return found


CONFIGURATIONS = {
    "int8": (QUANTIZATION,),
    "4 bits": (LOW_BITS,),
    "pruning": (PRUNING, QUANTIZATION),
    "taylor": (TAYLOR,),
    "sparsity": (MAGNITUDE, QUANTIZATION),
    "distillation": (QUANTIZATION, DISTILLATION),
}


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


# strip and shrink


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
    difference = (plain(images(seed=5)) - in_evaluation(module)).abs()
    # Halves go to the even level in torch, up in the compressed module: see the next test.
    assert difference.quantile(0.75) == 0 and difference.max() <= (0.01 if rounds else 0)
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


# Other algorithms, other modules


def test_levels_of_sparsity(module):
    module, compression = trained(module, MAGNITUDE, steps=9, steps_per_epoch=2)
    assert compression.statistics()["sparsity"] == pytest.approx(0.6, abs=0.01)
    zeros = [(each == 0).float().mean() for each in (module.block.conv.weight, module.wide.weight)]
    assert min(zeros) > 0.1


def test_rb_sparsity_adds_its_loss(module):
    module, compression = trained(module, RB, steps=5)
    figures = compression.statistics()
    density = 1 - figures["sparsity"]
    expected = ((density - (1 - figures["sparsity_asked_for"])) / 0.05) ** 2
    loss = compression.loss(images(), None)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and expected > 1
    loss.backward()
    assert module.stem.parametrizations.weight[0].logits.grad.abs().sum() > 0


def test_distillation_learns_from_the_original_in_evaluation_mode(module):
    original = copy.deepcopy(module)
    module, compression = trained(module.train(), DISTILLATION)
    outputs = module(images())
    taught = in_evaluation(original, images())
    soft = torch.softmax(taught / 3, 1) * torch.log_softmax(outputs / 3, 1)
    expected = -9 * soft.sum(1).mean()
    assert torch.isclose(compression.loss(images(), outputs), expected, rtol=1e-5)


def test_movement_sparsity_moves_with_every_step(module):
    params = {
        "warmup_start_epoch": 1,
        "warmup_end_epoch": 3,
        "importance_regularization_factor": 0.1,
    }
    module, compression = trained(module, {"algorithm": "movement_sparsity", "params": params})
    assert compression.statistics()["sparsity"] > 0
    assert (module.wide.weight == 0).any()


def test_binarized_behind_padding():
    torch.manual_seed(0)
    sizes = {"kernel_size": 3, "stride": 2, "padding": 1}
    layers = [torch.nn.Conv2d(3, 8, **sizes), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, **sizes)]
    module = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 2))
    binarization = {"algorithm": "binarization", "mode": "xnor", "initializer": NO_ADAPTATION}
    module = compressed(module, binarization)
    x = images(seed=5)
    expected = module.shadow.model(x, training=False)
    assert (in_evaluation(module, x) - expected).abs().max() <= 1e-6
    assert any("threshold" in name for name, _ in module.named_parameters())
    module.train()(x).square().sum().backward()
    assert module.get_submodule("2").parametrizations.weight.original.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="equal steps"):
        kct.strip(module)


def test_half_precision(module):
    module, compression = trained(module, PRUNING, QUANTIZATION)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module.train()(images())
        loss = torch.nn.functional.cross_entropy(outputs, labels())
    loss.backward()
    assert torch.isfinite(module.stem.parametrizations.weight.original.grad).all()
    assert (outputs.float() - module(images())).abs().max() <= 0.1


def test_without_algorithms_that_add_one_the_loss_is_zero(module):
    _, compression = trained(module, QUANTIZATION, steps=1)
    assert compression.loss(images(), None) == 0


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent = getattr(torch.nn, kind)(6, 5, batch_first=True)
        self.head = torch.nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_weights_are_rounded(kind):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 7, 6)
    module = kct.compress_model(Recurrent(kind), config_of(QUANTIZATION), x, data=[x])
    expected = module.shadow.model(x, training=False)
    assert (in_evaluation(module, x) - expected).abs().max() <= 1e-6
    module.train()(x).sum().backward()
    weight = module.recurrent.parametrizations.weight_hh_l0
    assert weight.original.grad.abs().sum() > 0 and weight[0].scale.grad.abs().sum() > 0
    assert (kct.strip(module)(x) - in_evaluation(module, x)).abs().max() <= 1e-6


def test_shared_modules_and_several_inputs():
    class Siamese(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = torch.nn.Linear(6, 5)
            self.head = torch.nn.Linear(10, CLASSES)

        def forward(self, a, b):
            return self.head(torch.cat([self.shared(a), self.shared(b)], 1))

    torch.manual_seed(0)
    pair = torch.randn(SAMPLES, 6), torch.randn(SAMPLES, 6)
    module = kct.compress_model(Siamese(), config_of(QUANTIZATION), pair, data=[(pair, labels())])
    with torch.no_grad():
        outputs = module.eval()(*pair)
    assert torch.equal(outputs, module.shadow.model(list(pair), training=False))
    assert torch.equal(kct.strip(module)(*pair), outputs)
    assert outputs.unique().numel() > 1


def test_weights_in_two_places_are_rounded_apart():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 6)
            self.head = torch.nn.Linear(6, 9)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (SAMPLES, 5))
    module = kct.compress_model(Tied(), config_of(LOW_BITS), tokens, data=[tokens])
    outputs = in_evaluation(module, tokens)
    assert torch.equal(outputs, module.shadow.model(tokens, training=False))
    plain = kct.strip(module)
    assert not torch.equal(plain.table.weight, plain.head.weight)
    assert (plain(tokens) - outputs).abs().max() <= 1e-6
    trained_one = {
        id(each.parametrizations.weight.original) for each in (module.table, module.head)
    }
    assert len(trained_one) == 1


def test_data_in_every_form(module):
    whole = compressed(module, QUANTIZATION)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images(), labels()), batch_size=SAMPLES
    )
    for data in (loader, images(), [(images(), labels())]):
        other = kct.compress_model(module, config_of(QUANTIZATION), images(), data=data)
        for one, two in zip(*(quantizers_of(m.shadow.model) for m in (whole, other)), strict=True):
            assert np.allclose(one.step(), two.step())


def test_plan_and_report_speak_of_the_module(module):
    planned = kct.plan(module, config_of(PRUNING, QUANTIZATION), images())
    assert {"stem", "block-conv", "depthwise"} <= {entry.layer for entry in planned.weights}
    module, _ = trained(module, PRUNING, QUANTIZATION)
    layers = {layer["layer"]: layer for layer in kct.report(module).to_dict()["layers"]}
    assert (layers["block-conv"]["filters_kept"], layers["block-conv"]["weight_bits"]) == (4, 8)
    small = kct.report(kct.shrink(module)).to_dict()["layers"]
    assert {each["layer"]: each["parameters"] for each in small}["block-conv"] == 4 * 4 * 9


# Export


@pytest.mark.parametrize("algorithms", [(QUANTIZATION,), (LOW_BITS,), (PRUNING, QUANTIZATION)])
def test_exported_ir_is_the_module_in_eight_bits(module, algorithms, tmp_path):
    module, _ = trained(module, *algorithms)
    report = kct.export(module, tmp_path / "model.xml")
    assert report.relative <= 1e-3
    assert report.eight_bit_layers == len(report.layers) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.bin",
        "model.verify.json",
        "model.xml",
    ]


def test_exported_shrunk_module(module, tmp_path):
    module, _ = trained(module, PRUNING, QUANTIZATION)
    report = kct.export(kct.shrink(module), tmp_path / "small.xml")
    assert report.relative <= 1e-3 and report.eight_bit_layers == len(report.layers)
    whole = kct.export(module, tmp_path / "whole.xml", images(2))
    assert report.stored_bytes < whole.stored_bytes


def test_exported_onnx(module, tmp_path):
    module, _ = trained(module, QUANTIZATION)
    report = kct.export(module, tmp_path / "model.onnx")
    assert report.relative <= 1e-3
    assert sum(layer.eight_bit for layer in report.layers if layer.type == "Convolution") == 4


def test_plain_module_is_exported_too(module, tmp_path):
    import openvino as ov

    assert kct.export(module.train(), tmp_path / "float.xml", images()) is None
    assert module.training
    run = ov.Core().compile_model(
        tmp_path / "float.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    result = run(images(7).numpy())[0]
    assert np.abs(result - in_evaluation(module, images(7)).numpy()).max() <= 1e-5


def test_nothing_is_written_where_an_export_fails(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("odd")

    with pytest.raises(Exception, match="odd"):
        kct.export(Odd(), tmp_path / "odd.xml", images())
    assert not list(tmp_path.iterdir())


# Errors


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
    along_two = kc.quantizers.SymmetricQuantizer(8, axis=(-2, -1))
    for quantizer in (along_two, BinaryActivations()):
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


def test_example(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("torch_digits", EXAMPLES / "torch_digits.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "FLOAT_EPOCHS", 2)
    result = invoke(example.main, ["--epochs", 1, "--out", tmp_path], monkeypatch)
    assert result.exit_code == 0, result.exception
    assert cells(result.output, "int8")[3] == "4 of 4"
    assert float(cells(result.output, "int8")[1].rstrip("%")) > 50
    assert (tmp_path / "torch_pruned_int8.xml").exists()
