"""Compressed torch modules: each algorithm, and modules of each kind."""

import copy

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND

import keras_compress as kc

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_training import (
    CLASSES,
    DISTILLATION,
    LOW_BITS,
    MAGNITUDE,
    NO_ADAPTATION,
    PRUNING,
    QUANTIZATION,
    RB,
    SAMPLES,
    compressed,
    config_of,
    copy_to_keras,
    images,
    in_evaluation,
    keras_network,
    labels,
    network,
    trained,
)

import keras_compress.torch as kct
from keras_compress.model_facts import quantizers_of


@pytest.fixture
def module():
    return network()


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


def test_binarized_behind_padding(tmp_path):
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
    assert torch.equal(kct.strip(module)(x), in_evaluation(module, x))
    report = kct.export(module, tmp_path / "model.xml")
    assert report.relative <= 1e-6 and report.eight_bit_layers == len(report.layers) == 3


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


HAWQ = QUANTIZATION | {
    "initializer": NO_ADAPTATION
    | {"precision": {"type": "hawq", "bits": [4, 8], "compression_ratio": 1.5}}
}
LEARNED = PRUNING | {
    "params": PRUNING["params"]
    | {
        "pruning_target": 0.3,
        "interlayer_ranking_type": "learned_ranking",
        "legr_params": {"generations": 6, "train_steps": 2, "population_size": 4, "num_samples": 2},
    }
}


@pytest.mark.parametrize("algorithm", [HAWQ, LEARNED], ids=["hawq", "legr"])
def test_searches_with_labels_find_what_they_do_in_keras(module, algorithm):
    twin = copy_to_keras(module, keras_network())
    twin.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batches = [(images(seed=seed), labels()) for seed in range(4)]
    same = [(x.permute(0, 2, 3, 1).numpy(), y.numpy()) for x, y in batches]
    config = config_of(algorithm)
    twin = kc.compress_model(twin, config, data=same, verbose=False)
    loss = torch.nn.functional.cross_entropy
    module = kct.compress_model(module, config, images(), data=batches, loss=loss)
    model = module.shadow.model
    if algorithm is HAWQ:
        for found, expected in zip(model.plan["precision"], twin.plan["precision"], strict=True):
            assert (found["layer"], found["bits"]) == (expected["layer"], expected["bits"])
            assert found["trace"] == pytest.approx(expected["trace"], rel=1e-3)
        assert {layer["bits"] for layer in model.plan["precision"]} == {4, 8}
    else:
        found, expected = (each.progress["filter_pruning"]["ranking"] for each in (model, twin))
        assert found.keys() == expected.keys()
        for name, pair in expected.items():
            assert np.allclose(found[name], pair, rtol=1e-3, atol=1e-6)


def test_a_search_without_a_loss(module):
    with pytest.raises(ValueError, match="compiled with a loss"):
        compressed(module, HAWQ)
