"""Mixed precision: widths by hand and by search, against brute force and against the IR."""

import itertools
import json

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc
from keras_compress.algorithms import Quantization
from keras_compress.algorithms.precision import PrecisionProblem
from keras_compress.graph.trace import trace
from keras_compress.options import ConfigError

WEIGHTS = {"stem": 216, "left": 1152, "right": 128, "head": 64}
TRACES = {"stem": 3e-3, "left": 1e-3, "right": 4e-3, "head": 2e-2}


def network(compiled=True):
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(inputs)
    left = layers.Conv2D(16, 3, padding="same", activation="relu", name="left")(x)
    right = layers.Conv2D(16, 1, name="right")(x)
    x = layers.Add(name="add")([left, right])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, layers.Dense(4, name="head")(x))
    if compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
    return model


def data(samples=64):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 8, 8, 3)).astype("float32")
    return x, random.integers(0, 4, samples)


@pytest.fixture
def traces(tmp_path):
    """Path of a file with traces: nothing has to be differentiated."""
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({f"{layer}/kernel": value for layer, value in TRACES.items()}))
    return str(path)


def config(path=None, device="ANY", **precision):
    if path:
        precision["traces_per_layer_path"] = path
    initializer = {"precision": {"type": "hawq"} | precision}
    algorithm = {"algorithm": "quantization", "initializer": initializer}
    return {"target_device": device, "compression": [algorithm]}


def chosen(decided):
    return {entry.layer: entry.bits for entry in decided.precision}


def weight_bits(model):
    return {
        layer.name: layer.transforms_of("kernel")[-1].bits
        for layer in model.layers
        if hasattr(layer, "transforms_of") and layer.transforms_of("kernel")
    }


def activation_bits(model):
    return {
        layer.name.removesuffix("-fake_quantize"): layer.quantizer.bits
        for layer in model.layers
        if hasattr(layer, "quantizer")
    }


# By hand


def test_widths_by_hand():
    manual = {
        "type": "manual",
        "bitwidth_per_scope": [[4, "left"], [2, "{re}^ri"], [5, "stem|OUTPUT"]],
    }
    model = kc.compress_model(network(False), config(**manual), data()[0], verbose=False)
    assert weight_bits(model) == {"stem": 8, "left": 4, "right": 2, "head": 8}
    assert activation_bits(model) == {"image": 8, "stem": 5, "left": 8, "add": 8, "pool": 8}


def test_the_last_entry_by_hand_counts_and_overrides_are_stronger():
    algorithm = Quantization(
        initializer={
            "precision": {
                "type": "manual",
                "bitwidth_per_scope": [[4, "{re}."], [2, "stem"], [3, "{re}OUTPUT$"]],
            }
        },
        scope_overrides={"weights": {"head": {"bits": 8}}},
    )
    bits = [algorithm.weight_spec(name).bits for name in ("stem", "left", "head")]
    assert bits == [2, 4, 8]
    assert algorithm.activation_spec("stem").bits == 3


def test_entries_by_hand_must_match():
    manual = {"type": "manual", "bitwidth_per_scope": [[4, "lefd"]]}
    with pytest.raises(ConfigError, match=r"bitwidth_per_scope: 'lefd' matches no node.*'left'"):
        kc.plan(network(), config(**manual))


@pytest.mark.parametrize(
    "precision", [{"type": "manual"}, {"type": "hawq", "bitwidth_per_scope": [[4, "left"]]}]
)
def test_entries_by_hand_go_with_the_type(precision):
    with pytest.raises(ConfigError, match="`bitwidth_per_scope` with type 'manual'"):
        kc.Config.load(config(**precision))


# By search


def problem(model, **precision):
    loaded = kc.Config.load(config(**precision))
    return PrecisionProblem(loaded.algorithms[0], trace(model), loaded)


def brute_force(problem, losses, budgets, allowed=lambda options: True):
    """Return the least loss over all combinations of options."""
    best = np.inf
    for indices in itertools.product(*(range(len(each.options)) for each in problem.layers)):
        options = {
            layer.name: layer.options[index]
            for layer, index in zip(problem.layers, indices, strict=True)
        }
        if allowed(options) and all(b.total(indices) <= b.limit for b in budgets):
            best = min(best, sum(each[i] for each, i in zip(losses, indices, strict=True)))
    return best


@pytest.mark.parametrize(
    "precision",
    [
        {"budget": {"bytes": 1100}},
        {"budget": {"bytes": 700}, "bits": [2, 3, 4, 6, 8]},
        {"budget": {"bit_operations": 3e6}},
        {"compression_ratio": 1.5},
        {"compression_ratio": 1.9, "bitwidth_assignment_mode": "strict"},
        {"compression_ratio": 1.2, "budget": {"bytes": 900, "bit_operations": 4e6}},
    ],
)
def test_the_search_finds_the_optimum_within_its_budget(precision):
    made = problem(network(), **precision)
    traces = {(name, "kernel"): value for name, value in TRACES.items()}
    perturbations = made.perturbations()
    found = made.solve(traces, perturbations)
    losses, budgets = made.losses(traces, perturbations), made.budgets()
    assert all(budget.total(found) <= budget.limit for budget in budgets)

    def same_tensor(options):  # both convolutions read the stem's output
        return not made.follows or options["left"][1] == options["right"][1]

    best = brute_force(made, losses, budgets, same_tensor)
    total = sum(each[index] for each, index in zip(losses, found, strict=True))
    assert total == pytest.approx(best, rel=1e-7)
    assert len({layer.options[i][0] for layer, i in zip(made.layers, found, strict=True)}) > 1


def test_the_loss_is_its_formula():
    model = network()
    made = problem(model, budget={"bytes": 900})
    perturbations = made.perturbations()
    kernel = numpy(model.get_layer("left").kernel)
    for bits in (2, 4):
        best = np.inf  # the least squared error that any scale per channel leaves
        for ratio in np.linspace(0.02, 1, 99):
            step = ratio * np.abs(kernel).max((0, 1, 2)) / (2 ** (bits - 1) - 1)
            codes = np.clip(np.rint(kernel / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            best = np.minimum(best, np.square(codes * step - kernel).sum((0, 1, 2)))
        assert perturbations["left", "kernel"][bits] == pytest.approx(best.sum(), rel=1e-3)
    traces = {(name, "kernel"): value for name, value in TRACES.items()}
    losses = made.losses(traces, perturbations)
    index = [layer.name for layer in made.layers].index("left")
    expected = 1e-3 / 2 * perturbations["left", "kernel"][4]
    assert losses[index][1] == pytest.approx(expected)
    negative = made.losses(traces | {("left", "kernel"): -1.0}, perturbations)
    assert not negative[index].any()


def test_widths_that_wait_for_their_epoch_change_as_much():
    model = network()
    asked = config(budget={"bytes": 900})
    asked["compression"][0]["params"] = {"weights_quant_start_epoch": 3}
    loaded = kc.Config.load(asked)
    staged = PrecisionProblem(loaded.algorithms[0], trace(model), loaded)
    assert staged.perturbations() == problem(model, budget={"bytes": 900}).perturbations()


def test_costs_are_those_of_the_model():
    made = problem(network(), compression_ratio=1.5)
    by_name = {layer.name: layer for layer in made.layers}
    assert {name: layer.parameters for name, layer in by_name.items()} == WEIGHTS
    products = {"stem": 64 * 216, "left": 64 * 1152, "right": 64 * 128, "head": 64}
    assert {name: layer.products for name, layer in by_name.items()} == products
    assert by_name["left"].bytes(4) == 1152 / 2 + 4 * 16
    assert by_name["left"].bytes(3) == by_name["left"].bytes(4)
    assert by_name["head"].bytes(2) == 64 / 4 + 4 * 4
    (ratio,) = made.budgets()
    eight = [layer.options.index((8, 8)) for layer in made.layers]
    assert ratio.total(eight) == 8 * sum(products.values())
    assert ratio.limit == pytest.approx(8 * sum(products.values()) / 1.5)


def test_activations_follow_the_widest_reader(traces):
    decided = kc.plan(network(), config(traces, compression_ratio=1.9))
    bits = chosen(decided)
    model = kc.compress_model(network(), config(traces, compression_ratio=1.9), data(), False)
    assert weight_bits(model) == bits
    assert activation_bits(model)["stem"] == max(bits["left"], bits["right"]) < 8
    assert activation_bits(model)["image"] == 8  # the model's input keeps its width


def test_activations_keep_their_width_for_bytes(traces):
    model = kc.compress_model(network(), config(traces, budget={"bytes": 700}), data(), False)
    assert set(activation_bits(model).values()) == {8}
    assert min(weight_bits(model).values()) < 8


def test_strict_widths_are_equal(traces):
    strict = {"compression_ratio": 1.5, "bitwidth_assignment_mode": "strict"}
    decided = kc.plan(network(), config(traces, **strict))
    entries = {entry.layer: entry for entry in decided.precision}
    assert all(entry.bits == entry.activation_bits for entry in entries.values())
    assert entries["left"].bits == entries["right"].bits
    assert entries["stem"].bits == 8


def test_overrides_are_not_searched_for(traces):
    made = config(traces, budget={"bytes": 900})
    made["compression"][0]["scope_overrides"] = {"weights": {"left": {"bits": 8}}}
    with pytest.raises(ConfigError, match=r"bytes of at least 1,430"):
        kc.plan(network(), made)
    made["compression"][0]["initializer"]["precision"]["budget"]["bytes"] = 1500
    assert chosen(kc.plan(network(), made))["left"] == 8


def test_the_configuration_of_the_model_says_every_width(traces):
    model = kc.compress_model(network(), config(traces, budget={"bytes": 700}), data(), False)
    again = kc.compress_model(network(), model.config, data(), False)
    assert weight_bits(again) == weight_bits(model)
    precision = model.config.algorithms[0].initializer.precision
    assert precision.type == "manual" and len(precision.bitwidth_per_scope) == 4


# What the plan shows


def test_the_plan_prints_what_was_searched_for(traces):
    text = str(kc.plan(network(), config(traces, budget={"bytes": 700})))
    for word in ("Precision: 4", "trace", "error, 2 bits", "error, 8 bits", "1,152", "0.02"):
        assert word in text
    decided = kc.plan(network(), config(traces, budget={"bytes": 700})).to_dict()
    assert [each["layer"] for each in decided["precision"]] == list(WEIGHTS)
    sizes = [each["bytes"] for each in decided["front"]]
    losses = [each["loss"] for each in decided["front"]]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and len(sizes) > 5


def test_the_front_is_drawn(tmp_path, traces):
    pytest.importorskip("matplotlib")
    decided = kc.plan(network(), config(traces, budget={"bytes": 700}))
    assert sum(entry.bytes for entry in decided.precision) <= 700
    expected = [TRACES[e.layer] / 2 * e.perturbations[e.bits] for e in decided.precision]
    assert [entry.loss for entry in decided.precision] == pytest.approx(expected)
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = tmp_path / f"front{suffix}"
        kc.draw_pareto(decided, path)
        assert path.read_bytes().startswith(start)
    kc.draw_pareto(decided.to_dict(), tmp_path / "again.svg")


def test_only_a_search_has_a_front(tmp_path):
    with pytest.raises(ValueError, match="Expected a plan with a search for widths"):
        kc.draw_pareto(kc.plan(network(), config()), tmp_path / "front.svg")
    assert not list(tmp_path.iterdir())


def test_without_data_the_plan_says_what_is_missing():
    decided = kc.plan(network(), config())
    assert not decided.precision and "labelled data" in decided.notes[-1]


def test_autoq_is_refused_by_naming_the_search():
    decided = kc.plan(network(), config(type="autoq", compression_ratio=0.15))
    keys = {key.key: key for key in decided.keys}
    for key in ("type", "compression_ratio"):
        status = keys[f"compression[0].initializer.precision.{key}"]
        assert status.status == "refused" and "type 'hawq' with a `budget`" in status.reason


# Traces


def test_traces_are_computed_written_and_read(tmp_path):
    path = tmp_path / "traces.json"
    made = config(str(path), compression_ratio=1.3, iter_number=12, num_data_points=32)
    first = kc.plan(network(), made, data())
    written = json.loads(path.read_text())
    assert sorted(written) == sorted(f"{name}/kernel" for name in WEIGHTS)
    assert [entry.trace for entry in first.precision] == [
        written[f"{entry.layer}/kernel"] for entry in first.precision
    ]
    read = kc.plan(network(compiled=False), made)  # neither data nor a loss are needed
    assert [entry.trace for entry in read.precision] == [entry.trace for entry in first.precision]


def test_all_that_was_found_is_written_where_asked(tmp_path, traces):
    made = config(traces, budget={"bytes": 700}, dump_init_precision_data=True)
    made["log_dir"] = str(tmp_path / "logs")
    decided = kc.plan(network(), made)
    written = json.loads((tmp_path / "logs" / "precision.json").read_text())
    assert {each["layer"]: each["bits"] for each in written["layers"]} == chosen(decided)
    assert written["traces"]["head/kernel"] == 2e-2 and len(written["front"]) > 5


@pytest.mark.skipif(BACKEND != "tensorflow", reason="measures the IR, the same on every backend")
def test_latency_is_measured(traces):
    decided = kc.plan(network(), config(traces, budget={"latency": 1000.0}))
    assert set(chosen(decided).values()) == {8}
    with pytest.raises(ConfigError, match="milliseconds of at least") as error:
        kc.plan(network(), config(traces, budget={"latency": 1e-6}))
    assert "beside what no width changes" in str(error.value)


# Errors


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"budget": {"bytes": 10}}, r"bytes of at least 566, received 10"),
        ({"compression_ratio": 5}, r"a compression_ratio of at most \d.*, received 5"),
        ({"budget": {"bit_operations": 9}}, r"bit-operations of at least [\d,]+, received 9"),
    ],
)
def test_impossible_budgets_say_what_is_possible(traces, precision, message):
    with pytest.raises(ConfigError, match=message):
        kc.plan(network(), config(traces, **precision))


@pytest.mark.parametrize("group", ["weights", "activations"])
def test_widths_that_a_device_lacks(group):
    algorithm = {"algorithm": "quantization", group: {"bits": 3}}
    for device, known in (("GPU", r"\[8\]"), ("NPU", r"\[2, 4, 8\]|\[4, 8\]")):
        with pytest.raises(ConfigError, match=rf"target_device {device}.*{known}.*Received: \[3\]"):
            kc.plan(network(), {"target_device": device, "compression": algorithm})
    for device in ("CPU", "ANY", "TRIAL"):
        kc.plan(network(), {"target_device": device, "compression": algorithm})


def test_candidates_that_a_device_lacks(traces):
    assert set(chosen(kc.plan(network(), config(traces, "GPU", compression_ratio=1))).values()) == {
        8
    }
    with pytest.raises(ConfigError, match=r"target_device NPU.*Received: \[3, 5\]"):
        kc.plan(network(), config(traces, "NPU", bits=[3, 5]))


def test_what_a_search_needs_is_asked_for_first(tmp_path):
    with pytest.raises(ValueError, match="compiled with a loss.*'hawq'"):
        kc.compress_model(network(False), config(), data())
    with pytest.raises(ValueError, match="Expected labelled data.*'hawq'.*data=None"):
        kc.compress_model(network(), config())
    with pytest.raises(ValueError, match="Expected labelled data"):
        kc.compress_model(network(), config(), data()[0])
    missing = str(tmp_path / "no" / "traces.json")
    with pytest.raises(ConfigError, match="there is no such folder"):
        kc.compress_model(network(), config(missing), data())
    with pytest.raises(ConfigError, match="it is a folder"):
        kc.compress_model(network(), config(str(tmp_path)), data())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expected `traces_per_layer_path` to name a JSON file"),
        (
            '{"stem/kernel": 1}',
            r"Received none for \['left/kernel', 'right/kernel', 'head/kernel'\]",
        ),
        ('{"stem/kernel": "much"}', "could not convert"),
    ],
)
def test_traces_are_checked(tmp_path, text, message):
    path = tmp_path / "traces.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        kc.plan(network(), config(str(path)))


# To the IR


@pytest.mark.skipif(BACKEND != "tensorflow", reason="looks at the IR, the same on every backend")
def test_mixed_widths_run_in_integers(tmp_path, traces):
    sizes = {}
    for size in (700, 5000):
        made = config(traces, budget={"bytes": size})
        model = kc.compress_model(network(), made, data(), verbose=False)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(*data(), verbose=0, callbacks=[kc.callbacks.Compress()])
        report = kc.export(model, tmp_path / f"{size}.xml")
        assert report.relative < 1e-3 and report.eight_bit_layers == len(report.layers) == 4
        sizes[size] = (tmp_path / f"{size}.bin").stat().st_size
    assert sizes[700] < 0.7 * sizes[5000]
