"""Widths of quantized weights as a rate: closed forms, brute force, and models made afresh."""

import itertools
import json

import keras
import numpy as np
import pytest
from accuracy_helpers import compiled, config, data, fitted, same, trained
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.algorithms.precision_rate import Widths
from keras_compress.options import ConfigError
from keras_compress.report import report

TRACES = {"first": 0.1, "second": 0.02, "head": 0.3}


@pytest.fixture(scope="module")
def original():
    return trained()


@pytest.fixture
def searched(tmp_path, original):
    """Return a function that makes a model whose widths were searched for."""

    def make(model=original, traces=TRACES, samples=None, algorithm=(), **precision):
        path = tmp_path / "traces.json"
        path.write_text(json.dumps({f"{name}/kernel": trace for name, trace in traces.items()}))
        precision = {"type": "hawq", "traces_per_layer_path": str(path)} | precision
        entry = {"algorithm": "quantization", "initializer": {"precision": precision}}
        made = config(entry | dict(algorithm), patience_epochs=0)
        samples = data()[0] if samples is None else samples
        return kc.compress_model(model, made, samples, verbose=False)

    return make


FREE = {"budget": {"bytes": 10_000}, "bits": [2, 3, 4, 8]}


def algorithm(model):
    (found,) = model.config.algorithms
    return found


def bits(model):
    return [layer.transforms_of("kernel")[-1].bits for layer in _dense(model)]


def _dense(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)]


def grids(model):
    names = ("bits", "half_range", "narrow_range", "gradient_scale", "signed")
    return [[getattr(q, name) for name in names] for q in model.quantizers()]


def test_the_rate_is_the_share_of_bytes_saved(searched):
    model = searched(**FREE)
    assert bits(model) == [8, 8, 8] and algorithm(model).rate(model) == 0.0
    algorithm(model).set_rate(model, 0.45)
    # Codes of 48, 144 and 48 weights; a step of four bytes for each of 12, 12 and 4 channels.
    sizes, steps, stored = (48, 144, 48), 4 * (12 + 12 + 4), {2: 2, 3: 4, 4: 4, 8: 8}
    used = sum(-(-n * stored[b] // 8) for n, b in zip(sizes, bits(model), strict=True)) + steps
    rate = algorithm(model).rate(model)
    assert rate == pytest.approx(1 - used / (240 + steps)) and rate >= 0.45
    assert sum(entry["bytes"] for entry in model.plan["precision"]) == used
    rows = [row for row in report(model).layers if row.weight_bits]
    biases = 4 * (12 + 12 + 4)
    assert sum(row.bytes_after for row in rows) == used + biases


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4, 0.5])
def test_widths_are_the_best_ones_by_brute_force(rate, searched):
    widths = Widths(searched(**FREE))

    def loss(chosen):
        pairs = zip(widths.entries, chosen, strict=True)
        return sum(TRACES[e["layer"]] * e["perturbations"][b] / 2 for e, b in pairs)

    fitting = [c for c in itertools.product((2, 3, 4, 8), repeat=3) if widths.rate(c) >= rate]
    assert loss(widths.at(rate)) == pytest.approx(min(map(loss, fitting)))
    assert widths.rate(widths.at(rate)) >= rate


def test_only_quantizers_change(searched):
    model = searched(**FREE)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables[2:]:
        variable.assign(np.full(variable.shape, 0.25))
    kept = [v for v in model.variables if "quantizer" not in v.path]
    before = [numpy(v).copy() for v in kept]
    variables = [id(v) for v in model.variables]
    slots = [numpy(v).copy() for v in model.optimizer.variables]
    algorithm(model).set_rate(model, 0.5)
    assert same(before, [numpy(v) for v in kept])
    assert [id(v) for v in model.variables] == variables
    assert same(slots, [numpy(v) for v in model.optimizer.variables])
    # Of a weight whose width has changed, the range is the one it gets in a new model.
    fresh = kc.compress_model(trained(), model.config, data()[0], verbose=False)
    for layer in _dense(model):
        scale = layer.transforms_of("kernel")[-1].scale
        expected = fresh.get_layer(layer.name).transforms_of("kernel")[-1].scale
        assert np.allclose(numpy(scale), numpy(expected), rtol=1e-6), layer.name


@pytest.mark.parametrize("precision", [FREE, {"compression_ratio": 1.1}])
def test_configuration_and_plan_stay_true(precision, searched, original, tmp_path):
    model = searched(**precision)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    algorithm(model).set_rate(model, 0.35)
    fresh = kc.compress_model(original, model.config, data()[0], verbose=False)
    assert grids(fresh) == grids(model)
    for part in ("weights", "edges"):
        assert fresh.plan[part] == model.plan[part]
    assert [entry["bits"] for entry in model.plan["precision"]] == bits(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = data()[0]
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert again.config == model.config and grids(again) == grids(model)


def test_back_to_8_bits(searched):
    model = searched(**FREE)
    before = grids(model), model.plan["weights"], model.config.to_dict()
    algorithm(model).set_rate(model, 0.5)
    assert before[0] != grids(model)
    algorithm(model).set_rate(model, 0.0)
    assert (grids(model), model.plan["weights"], model.config.to_dict()) == before


def test_compiled_functions_see_the_new_widths(searched, original):
    model = searched(**FREE)
    model.compile("adam", "mse")
    x = data()[0]
    wide = model.predict(x, verbose=0)
    algorithm(model).set_rate(model, 0.5)
    narrow = model.predict(x, verbose=0)
    assert np.allclose(narrow, numpy(model(x, training=False)), atol=1e-6)
    assert np.abs(narrow - wide).max() > 1e-3


def test_activations_follow_where_the_search_linked_them(searched):
    """`strict`: a layer and the tensor that it reads have one width."""
    model = searched(compression_ratio=1.05, bitwidth_assignment_mode="strict", bits=[2, 4, 8])
    assert algorithm(model).initializer.precision.bitwidth_assignment_mode == "strict"
    algorithm(model).set_rate(model, 0.4)
    tensors = {
        layer.name: layer.quantizer.bits for layer in model.layers if hasattr(layer, "quantizer")
    }
    for entry in model.plan["edges"]:
        for reader in entry["readers"]:
            layer = model.get_layer(reader)
            if isinstance(layer, layers.Dense) and layer.name != "first":
                assert tensors[entry["name"]] == layer.transforms_of("kernel")[-1].bits
    assert tensors["point-fake_quantize"] == 8  # the model's input keeps its width
    assert min(bits(model)) < 8 and bits(model)[0] == 8


def two_readers():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="point")
    x = layers.Dense(8, activation="relu", name="first")(inputs)
    x = layers.Add()([layers.Dense(8, name="second")(x), layers.Dense(8, name="third")(x)])
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.ReLU()(x)))


def test_layers_that_read_one_tensor_have_one_width_with_strict(searched):
    traces = {"first": 0.1, "second": 1.0, "third": 1e-6, "head": 0.3}
    found = []
    for mode in ("liberal", "strict"):
        model = searched(
            two_readers(), traces, compression_ratio=1.05, bitwidth_assignment_mode=mode
        )
        algorithm(model).set_rate(model, 0.2)
        widths = {layer.name: layer.transforms_of("kernel")[-1].bits for layer in _dense(model)}
        found.append(widths["second"] == widths["third"])
        tensor = model.get_layer("first-fake_quantize").quantizer.bits
        assert tensor == max(widths["second"], widths["third"])
    assert found == [False, True]


def test_widths_that_cannot_be(searched, original):
    model = searched(**FREE)
    before = grids(model)
    with pytest.raises(ConfigError, match="Expected a rate that can be reached.*rate=0.9"):
        algorithm(model).set_rate(model, 0.9)
    assert grids(model) == before
    precision = {"type": "manual", "bitwidth_per_scope": [[4, "first"]]}
    entry = {"algorithm": "quantization", "initializer": {"precision": precision}}
    by_hand = kc.compress_model(original, config(entry), data()[0], verbose=False)
    by_hand.compile("adam", "mse", metrics=["accuracy"])
    with pytest.raises(ConfigError, match="Expected a model whose widths were searched for"):
        fitted(by_hand)


def test_second_operands_of_another_kind_are_refused(searched):
    inputs = keras.Input((4, 4), name="rows")
    x = layers.Dense(4, name="first")(inputs)
    y = layers.Dense(4, name="second")(x)
    outputs = [keras.ops.matmul(x, y), layers.Dense(4, name="head")(y)]
    given = {"samples": np.ones((8, 4, 4), "float32"), "compression_ratio": 1.05}
    made = searched(keras.Model(inputs, outputs), algorithm={"preset": "mixed"}, **given)
    before = grids(made)
    for move in (algorithm(made).rate, lambda model: algorithm(made).set_rate(model, 0.2)):
        with pytest.raises(ConfigError, match=r"\['second-fake_quantize'\] with preset 'mixed'"):
            move(made)
    assert grids(made) == before
    made = searched(keras.Model(inputs, outputs), **given)  # symmetric ones can move
    assert Widths(made).followers == {"first", "second"}
    algorithm(made).set_rate(made, 0.3)
    second = made.get_layer("second-fake_quantize").quantizer
    assert second.half_range == (second.bits == 8)


def test_the_loop_moves_widths(searched, original):
    model = compiled(searched(**FREE))
    result = fitted(model, baseline=original)
    assert result.epochs[0].rate == 0 and result.rate > 0 and result.reached
    assert result.rate == max(each.rate for each in result.epochs if each.within)
    assert algorithm(model).rate(model) == result.rate
    again = model.evaluate(*data(32, 1), verbose=0, return_dict=True)
    assert again["accuracy"] == pytest.approx(result.value, abs=1e-6)
    fresh = kc.compress_model(original, model.config, data()[0], verbose=False)
    assert grids(fresh) == grids(model)
