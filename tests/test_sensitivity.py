"""Sensitivity: figures against layers compressed by themselves, and the search for scopes."""

import json
import re

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc
from keras_compress import demo
from keras_compress.graph.trace import trace
from keras_compress.layers import FakeQuantize
from keras_compress.sensitivity import LayerSensitivity, Sensitivity, Suggestion, sensitivity
from keras_compress.training.switches import Switches, with_switches

NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
QUANTIZATION = {
    "algorithm": "quantization",
    "weights": {"bits": 2},
    "activations": {"bits": 3},
    "initializer": NO_ADAPTATION,
}
WEIGHTS = QUANTIZATION | {"activations": {"ignored_scopes": ["{re}."]}}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.5, "round_to": 1, "prune_first_conv": True},
    "initializer": NO_ADAPTATION,
}
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.7, "sparsity_level_setting_mode": "local"},
    "initializer": NO_ADAPTATION,
}
CONST = {"algorithm": "const_sparsity"}
BINARIZATION = {"algorithm": "binarization", "initializer": NO_ADAPTATION}
STAGED = QUANTIZATION | {"params": {"weights_quant_start_epoch": 2}}


def chain():
    """Three dense layers and a normalization."""
    inputs = keras.Input((6,), name="vector")
    x = layers.Dense(12, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(10, activation="relu", name="second")(x)
    return compiled(keras.Model(inputs, layers.Dense(4, name="head")(x), name="chain"))


def residual():
    """Convolutions of which two are added, and a layer behind data movement."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = short = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="inner")(x)
    x = layers.Conv2D(8, 3, padding="same", name="outer")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="add")([x, short]))
    x = layers.Flatten(name="flatten")(layers.MaxPooling2D(name="pool")(x))
    return compiled(keras.Model(inputs, layers.Dense(4, name="head")(x), name="residual"))


def compiled(model):
    """Compile as is quickest for a small network."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"], jit_compile=BACKEND == "jax")
    return model


def uncompiled(model):
    return keras.Model(model.input, model.output, name=model.name)


def samples(model, count=40):
    """Return inputs and the classes that the float model predicts: its accuracy is 1."""
    x = np.random.default_rng(0).normal(size=(count, *model.input.shape[1:])).astype("float32")
    return x, numpy(model(x)).argmax(axis=-1)


def config(*algorithms):
    return {"compression": list(algorithms)}


def scoped(names, *algorithms, key="target_scopes"):
    return config(*(each | {key: list(names)} for each in algorithms))


def final(model, configuration, data):
    """Compress through the public functions alone, with pruning and sparsity at their ends."""
    compressed = kc.compress_model(model, configuration, data=data, verbose=False)
    for algorithm in compressed.config.algorithms:
        if algorithm.adjustable:
            algorithm.set_rate(compressed, algorithm.final_rate)
    for quantizer in compressed.quantizers():
        quantizer.enable()
    return compressed


def give_ranges(model, source):
    """Give the activation quantizers of a model the ranges of those of the same name."""
    found = [layer for layer in model.layers if isinstance(layer, FakeQuantize)]
    for layer in found:
        other = source.get_layer(layer.name).quantizer
        layer.quantizer.signed = other.signed
        for variable, value in zip(
            layer.quantizer.range_variables, other.range_variables, strict=True
        ):
            variable.assign(np.array(numpy(value)))
    return model


class Recorder:
    """A metric that keeps all outputs, and is their distance from some given ones."""

    def __init__(self, x, reference):
        self.x, self.reference = x, reference
        self.outputs = []

    def __call__(self, model):
        self.outputs.append(numpy(model(self.x)))
        return float(np.square(self.outputs[-1] - self.reference).mean())


CASES = {
    "weights": (chain, [WEIGHTS]),
    "quantization": (chain, [QUANTIZATION]),
    "pruning": (chain, [PRUNING]),
    "sparsity": (chain, [SPARSITY]),
    "pruning and quantization": (chain, [PRUNING, QUANTIZATION]),
    "sparsity and quantization": (chain, [SPARSITY, QUANTIZATION]),
    "staged": (chain, [STAGED]),
    "residual, pruned": (residual, [PRUNING]),
    "residual, weights": (residual, [WEIGHTS]),
    "residual, pruning and sparsity": (residual, [PRUNING, SPARSITY]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_that_of_the_layer_compressed_by_itself(case):
    make, algorithms = CASES[case]
    model = make()
    x, y = data = samples(model)
    record = Recorder(x, numpy(model(x)))
    found = sensitivity(model, config(*algorithms), data, metric=record, mode="min", verbose=False)
    full = final(model, config(*algorithms), data)
    off, everything, *each = record.outputs
    assert np.array_equal(off, numpy(model(x)))
    assert found.baseline == 0
    assert np.array_equal(everything, numpy(full(x)))
    assert found.compressed > 0
    in_order = sorted(found.layers, key=lambda e: model.layers.index(model.get_layer(e.layer)))
    for entry, outputs in zip(in_order, each, strict=True):
        targets = [a for a in algorithms if a is not PRUNING or is_prunable(full, entry)]
        alone = final(model, scoped(entry.members, *targets), data) if targets else model
        expected = numpy(give_ranges(alone, full)(x))
        assert np.allclose(outputs, expected, rtol=1e-6, atol=1e-6)
        assert entry.drop == entry.value == pytest.approx(np.square(outputs - off).mean())
    assert [e.drop for e in found.layers] == sorted((e.drop for e in found.layers), reverse=True)
    assert found.layers[0].drop > 0


def is_prunable(full, entry):
    groups = [group for group in full.plan["groups"] if not group["reason"]]
    return any(set(group["layers"]) <= set(entry.members) for group in groups)


def test_of_magnitude_sparsity_by_hand():
    model = chain()
    x, y = data = samples(model)
    accuracy = {}
    for name in ("first", "second", "head"):
        kernel = model.get_layer(name).kernel
        before = np.array(numpy(kernel))
        threshold = np.sort(np.abs(before), axis=None)[round(0.7 * before.size)]
        kernel.assign(np.where(np.abs(before) < threshold, 0, before))
        accuracy[name] = np.mean(numpy(model(x)).argmax(axis=-1) == y)
        kernel.assign(before)
    found = sensitivity(model, config(SPARSITY), data, verbose=False)
    assert {e.layer: e.value for e in found.layers} == pytest.approx(accuracy)
    assert {e.layer: e.drop for e in found.layers} == pytest.approx(
        {name: 1 - value for name, value in accuracy.items()}
    )
    assert (found.metric, found.baseline) == ("accuracy", 1)


def test_layers_whose_channels_go_together_are_one_entry():
    model = residual()
    data = samples(model)
    record = Recorder(data[0], data[1][:, None])
    found = sensitivity(model, config(PRUNING), data, record, verbose=False)
    assert {e.layer: e.members for e in found.layers} == {
        "stem": ("stem", "outer"),
        "inner": ("inner",),
    }
    found = sensitivity(model, config(PRUNING, QUANTIZATION), data, record, verbose=False)
    assert {e.layer: e.members for e in found.layers} == {
        "stem": ("stem", "outer"),
        "inner": ("inner",),
        "add": ("add",),
        "head": ("head",),
    }


def test_a_tensor_that_is_moved_belongs_to_what_computes_with_it():
    """The quantizer before pooling and flattening is that of the dense layer."""
    model = residual()
    x, _ = data = samples(model)
    only = scoped(["head"], QUANTIZATION)
    record = Recorder(x, numpy(model(x)))
    found = sensitivity(model, only, data, metric=record, mode="min", verbose=False)
    (entry,) = found.layers
    assert entry.layer == "head"
    assert np.array_equal(record.outputs[1], record.outputs[2])
    assert np.array_equal(record.outputs[2], numpy(final(model, only, data)(x)))


def test_rounded_outputs_have_an_entry():
    model = chain()
    rounded = QUANTIZATION | {"quantize_outputs": True}
    x, y = samples(model)
    found = sensitivity(model, config(rounded), x, Recorder(x, y[:, None]), verbose=False)
    assert {e.layer for e in found.layers} == {"first", "second", "head", "model output"}


@pytest.mark.parametrize("rest", [(), (QUANTIZATION,)], ids=["alone", "and quantization"])
def test_binarization(rest):
    model = residual()
    x, _ = data = samples(model)
    record = Recorder(x, numpy(model(x)))
    sensitivity(model, config(*rest, BINARIZATION), data, record, mode="min", verbose=False)
    assert np.array_equal(record.outputs[0], numpy(model(x)))
    full = final(model, config(*rest, BINARIZATION), data)
    assert np.array_equal(record.outputs[1], numpy(full(x)))


def test_zeros_that_are_there_cost_nothing():
    model = chain()
    found = sensitivity(model, config(CONST), samples(model), verbose=False)
    assert [e.drop for e in found.layers] == [0, 0, 0]
    assert [e.layer for e in found.layers] == ["first", "second", "head"]


@pytest.mark.parametrize("case", ["pruning and quantization", "residual, pruned", "staged"])
def test_a_twin_with_switches_is_the_compressed_model(case):
    make, algorithms = CASES[case]
    model = make()
    x, _ = data = samples(model)
    full = final(model, config(*algorithms), data)
    twin = with_switches(full, trace(model))
    assert np.array_equal(numpy(twin(x)), numpy(full(x)))
    assert (twin.config, twin.progress) == (full.config, full.progress)
    assert all(quantizer.staged and quantizer.is_on for quantizer in twin.quantizers())
    named = {(layer.name, v.name) for layer in full.layers for v in layer.variables}
    assert named <= {(layer.name, v.name) for layer in twin.layers for v in layer.variables}
    values = [np.array(numpy(v)) for v in full.variables]
    Switches(twin).put(())
    assert np.array_equal(numpy(twin(x)), numpy(model(x)))
    assert all(np.array_equal(a, numpy(v)) for a, v in zip(values, full.variables, strict=True))


class Gated(keras.Model):
    """A subclassed model: Keras numbers its operations anew whenever it is traced."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left = layers.Dense(6, name="left")
        self.right = layers.Dense(6, name="right")
        self.head = layers.Dense(4, name="head")

    def call(self, inputs):
        return self.head(keras.ops.relu(self.left(inputs) * self.right(inputs)))


def test_a_subclassed_model():
    model = Gated(name="gated")
    x = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")
    before = numpy(model(x))
    record = Recorder(x, before)
    given = (config(QUANTIZATION), x, record)
    full = sensitivity(model, *given, mode="min", verbose=False)
    assert np.array_equal(record.outputs[0], before)
    assert len(full.layers) == 4
    budget = full.compressed / 2
    found = sensitivity(model, *given, suggest=True, budget=budget, mode="min", verbose=False)
    assert {"left", "right", "head"}.issuperset(found.suggestion.ignored_scopes)
    assert 0 < found.suggestion.value <= budget


# Metrics.


def test_metrics_are_those_of_keras():
    model = chain()
    x, _ = samples(model)
    data = x, np.random.default_rng(1).integers(0, 4, len(x))
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    for metric in ("accuracy", keras.metrics.SparseCategoricalAccuracy(name="accuracy"), "loss"):
        found = sensitivity(model, config(WEIGHTS), data, metric, verbose=False)
        name = metric if metric == "loss" else "accuracy"
        assert found.metric == name
        assert found.baseline == pytest.approx(expected[name], rel=1e-6)
        for entry in found.layers:
            sign = 1 if name == "loss" else -1
            assert entry.drop == pytest.approx(sign * (entry.value - found.baseline))


def test_a_model_that_is_not_compiled_has_metrics_too():
    model = uncompiled(chain())
    found = sensitivity(model, config(WEIGHTS), samples(model), verbose=False)
    assert found.baseline == 1
    assert not model.compiled


def test_sample_weights_count_in_a_loss():
    model = chain()
    x, y = samples(model)
    weights = np.linspace(0, 2, len(x)).astype("float32")
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)[0]
    found = sensitivity(model, config(WEIGHTS), (x, y, weights), "loss", verbose=False)
    assert found.baseline == pytest.approx(expected, rel=1e-6)


def test_a_function_needs_no_labels():
    model = chain()
    x, _ = samples(model)

    def spread(judged):
        return numpy(judged(x)).std()

    found = sensitivity(model, config(QUANTIZATION), x, metric=spread, verbose=False)
    assert found.metric == "spread"
    assert found.baseline == pytest.approx(numpy(model(x)).std())


def test_the_mode_turns_the_drop_around():
    model = chain()
    data = samples(model)
    drops = []
    for mode in ("max", "min"):
        found = sensitivity(model, config(WEIGHTS), data, mode=mode, verbose=False)
        drops.append({e.layer: e.drop for e in found.layers})
    assert drops[0] == {name: -drop for name, drop in drops[1].items()}
    assert max(drops[0].values()) > 0


def test_what_is_not_a_number_is_the_worst():
    model = chain()
    x, _ = samples(model)
    values = iter([1.0, 0.5, 0.9, float("nan"), 0.8])
    found = sensitivity(model, config(WEIGHTS), x, lambda m: next(values), verbose=False)
    assert [(e.layer, e.drop) for e in found.layers] == [
        ("second", np.inf),
        ("head", pytest.approx(0.2)),
        ("first", pytest.approx(0.1)),
    ]
    assert "second" in str(found)


# Data.


def test_one_compiled_evaluation_serves_all_layers():
    if BACKEND == "torch":
        pytest.skip("torch runs eagerly: there is nothing to trace")

    class Traced(keras.metrics.SparseCategoricalAccuracy):
        traces = 0

        def update_state(self, *args, **kwargs):
            Traced.traces += 1
            return super().update_state(*args, **kwargs)

    model = chain()
    counts = []
    for only in (["head"], ["first", "second", "head"]):
        Traced.traces = 0
        configuration = scoped(only, QUANTIZATION)
        sensitivity(model, configuration, samples(model), Traced(), verbose=False)
        counts.append(Traced.traces)
    assert counts[0] == counts[1] > 0


def test_batches_are_read_once_and_in_one_order():
    model = chain()
    x, y = samples(model, 96)
    random = np.random.default_rng(3)

    class Shuffled:
        """Batches in another order whenever they are read."""

        def __iter__(self):
            for start in random.permutation([0, 32, 64]):
                yield x[start : start + 32], y[start : start + 32]

    def endless():
        while True:
            yield from ((x[start : start + 32], y[start : start + 32]) for start in (0, 32, 64))

    expected = sensitivity(model, config(WEIGHTS), (x, y), verbose=False)
    assert sensitivity(model, config(WEIGHTS), (x, y), verbose=False) == expected
    assert sensitivity(model, config(WEIGHTS), Shuffled(), verbose=False) == expected
    found = sensitivity(model, config(WEIGHTS), endless(), samples=96, verbose=False)
    assert found == expected
    some = sensitivity(model, config(WEIGHTS), (x, y), samples=33, verbose=False)
    assert some == sensitivity(model, config(WEIGHTS), (x[:64], y[:64]), verbose=False)


def test_statistics_are_not_adapted_and_the_model_is_left_alone():
    model = chain()
    x, y = data = samples(model)
    adapting = {key: value for key, value in QUANTIZATION.items() if key != "initializer"}
    given = config(adapting)
    before, weights = json.dumps(given), [np.array(w) for w in model.get_weights()]
    record = Recorder(x, numpy(model(x)))
    found = sensitivity(model, given, data, record, verbose=False)
    assert found.baseline == 0
    assert found == sensitivity(model, config(QUANTIZATION), data, record, verbose=False)
    assert json.dumps(given) == before
    assert all(np.array_equal(*pair) for pair in zip(weights, model.get_weights(), strict=True))


def test_distillation_has_no_part():
    model = chain()
    x, y = data = samples(model)
    record = Recorder(x, y[:, None])
    distillation = {"algorithm": "knowledge_distillation", "type": "softmax"}
    found = sensitivity(model, config(WEIGHTS, distillation), data, record, verbose=False)
    assert found == sensitivity(model, config(WEIGHTS), data, record, verbose=False)


def test_widths_are_searched_for(tmp_path):
    model = chain()
    data = samples(model)
    search = {"type": "hawq", "bits": [2, 8], "iter_number": 2, "num_data_points": 8}
    search |= {"traces_per_layer_path": str(tmp_path / "traces.json")}
    precision = {"precision": search | {"dump_init_precision_data": True}}
    searched = QUANTIZATION | {"weights": {}, "initializer": NO_ADAPTATION | precision}
    whole = config(searched) | {"log_dir": str(tmp_path / "log")}
    x, _ = data
    record = Recorder(x, numpy(model(x)))
    sensitivity(model, whole, data, record, mode="min", verbose=False)
    assert not (tmp_path / "log").exists()
    expected = kc.compress_model(model, whole, data=data, verbose=False)
    assert np.array_equal(record.outputs[1], numpy(expected(x)))


def test_a_ranking_is_learned(tmp_path):
    model = chain()
    data = samples(model, 64)
    legr = {"generations": 3, "population_size": 2, "train_steps": 0}
    params = PRUNING["params"] | {"interlayer_ranking_type": "learned_ranking"}
    params |= {"legr_params": legr, "save_ranking_coeffs_path": str(tmp_path / "ranking.json")}
    learned = config(PRUNING | {"params": params})
    x, _ = data
    record = Recorder(x, numpy(model(x)))
    sensitivity(model, learned, data, record, mode="min", verbose=False)
    assert not list(tmp_path.iterdir())
    assert np.array_equal(record.outputs[1], numpy(final(model, learned, data)(x)))


# Suggestions.


def costs(table, again=None):
    """Return a metric that looks up which layers are rounded: minus the cost of that set.

    Args:
        table: {names of the layers, joined by blanks: cost}.
        again: the same for models that cannot be switched, where it differs.
    """

    def score(model):
        on, can_switch = [], False
        for name in ("first", "second", "head"):
            layer = model.get_layer(name)
            if not hasattr(layer, "raw_weight"):
                continue
            can_switch |= any(getattr(q, "staged", False) for q in layer.transforms_of("kernel"))
            if not np.array_equal(layer.effective_weight("kernel"), layer.raw_weight("kernel")):
                on.append(name)
        found = table if can_switch or again is None else table | again
        return 0.0 - found[" ".join(on)]

    return score


ADDED = {
    "": 0,
    "first": 5,
    "second": 3,
    "head": 1,
    "first second": 8,
    "first head": 6,
    "second head": 4,
    "first second head": 9,
}
# The head costs much beside any other, and the first layer only beside the head.
JOINT = {
    "": 0,
    "first": 5,
    "second": 1,
    "head": 3,
    "first second": 1,
    "first head": 9,
    "second head": 9,
    "first second head": 9,
}


@pytest.mark.parametrize(
    ("table", "budget", "scopes", "value"),
    [
        (ADDED, 9, (), -9),
        (ADDED, 4.5, ("first",), -4),
        (ADDED, 4, ("first",), -4),
        (ADDED, 3.9, ("first", "second"), -1),
        (JOINT, 2, ("head",), -1),
    ],
)
def test_suggestion_by_hand(table, budget, scopes, value):
    model = chain()
    x, _ = samples(model)
    found = sensitivity(
        model, config(WEIGHTS), x, costs(table), suggest=True, budget=budget, verbose=False
    )
    assert found.suggestion == Suggestion(scopes, value, budget)
    assert [e.drop for e in found.layers] == sorted((5, 3, 1), reverse=True)


def test_what_counts_is_the_model_that_is_compressed_with_the_scopes():
    model = chain()
    x, _ = samples(model)
    score = costs(ADDED, again={"second head": 7})
    found = sensitivity(model, config(WEIGHTS), x, score, suggest=True, budget=4, verbose=False)
    assert found.suggestion == Suggestion(("first", "second"), -1, 4)


def test_a_budget_that_cannot_be_kept():
    model = chain()
    x, _ = samples(model)
    score = costs(ADDED, again={"": 2})
    asked = {"suggest": True, "budget": 0, "verbose": False}
    found = sensitivity(model, config(WEIGHTS), x, score, **asked)
    assert found.suggestion is None and found.layers
    assert re.search(r"Nothing to suggest: for a budget of 0.*score=-2 \(0 in float", found.note)
    assert found.note in " ".join(str(found).split())
    refused = sensitivity(model, config(SPARSITY), x, costs(ADDED), **asked)
    assert "`compress_model` refuses" in refused.note
    assert "['first', 'second', 'head']" in refused.note
    assert sensitivity(model, config(WEIGHTS), x, costs(ADDED), verbose=False).note == ""


def test_sparsity_leaves_operations_without_weights_to_quantization():
    """Its `ignored_scopes` take layers with weights only."""
    model = residual()
    algorithms = [SPARSITY, QUANTIZATION]
    x, _ = data = samples(model)
    record = Recorder(x, numpy(model(x)))
    full = sensitivity(model, config(*algorithms), data, record, mode="min", verbose=False)
    assert "add" in [e.layer for e in full.layers]
    found = sensitivity(
        *(model, config(*algorithms), data, record),
        suggest=True,
        budget=0.5 * full.compressed,
        mode="min",
        verbose=False,
    )
    scopes = found.suggestion.ignored_scopes
    assert scopes and "add" not in scopes
    again = final(model, scoped(scopes, *algorithms, key="ignored_scopes"), data)
    assert found.suggestion.value == pytest.approx(record(again))
    assert found.suggestion.value <= found.suggestion.budget


def test_scopes_are_added_to_those_that_are_there():
    model = chain()
    x, _ = samples(model)
    given = config(WEIGHTS | {"ignored_scopes": ["first"]})
    found = sensitivity(model, given, x, costs(ADDED), suggest=True, budget=2, verbose=False)
    assert [e.layer for e in found.layers] == ["second", "head"]
    assert found.suggestion == Suggestion(("second",), -1, 2)


def test_suggestion_for_a_trained_network():
    keras.utils.set_random_seed(0)
    (x, y), _, test = demo.load_digits()
    inputs = keras.Input((8, 8, 1), name="image")
    z = layers.Conv2D(8, 3, use_bias=False, name="stem")(inputs)
    z = layers.ReLU(name="relu")(layers.BatchNormalization(momentum=0.9, name="norm")(z))
    z = layers.Conv2D(16, 3, strides=2, activation="relu", name="body")(z)
    z = layers.Conv2D(16, 1, activation="relu", name="mix")(z)
    outputs = layers.Dense(10, name="digit")(layers.Flatten(name="flat")(z))
    model = keras.Model(inputs, outputs, name="digits")
    demo.train(model, (x, y), None, epochs=6, rate=1e-2)
    judged = test
    low = QUANTIZATION | {"activations": {"bits": 8}}
    found = sensitivity(model, config(low), judged, suggest=True, budget=0.05, verbose=False)
    assert found.baseline == pytest.approx(model.evaluate(*judged, verbose=0)[1])
    assert found.baseline > 0.9
    assert found.baseline - found.compressed > 0.05
    scopes = found.suggestion.ignored_scopes
    assert scopes and set(scopes) < {e.layer for e in found.layers}
    assert found.baseline - found.suggestion.value <= 0.05
    again = final(model, scoped(scopes, low, key="ignored_scopes"), judged)
    compiled(again)
    assert again.evaluate(*judged, verbose=0)[1] == pytest.approx(found.suggestion.value)
    left = {entry["layer"] for entry in again.plan["weights"]}
    assert left == {e.layer for e in found.layers} - set(scopes)


# What is shown, and what is refused.


def test_table_and_dictionary():
    entries = (LayerSensitivity("b", 0.5, 0.4, ("b", "c")), LayerSensitivity("a", 0.9, 0.0, ("a",)))
    found = Sensitivity("accuracy", 0.9, 0.4, entries, Suggestion(("b", "c"), 0.875, 0.05))
    text = str(found)
    assert "accuracy: 0.9 in float, 0.4 compressed" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["b,"] == ["b,", "c", "0.5", "0.4", "█" * 30]
    assert rows["a"] == ["a", "0.9", "0"]
    assert 'With "ignored_scopes": ["b", "c"]: 0.875 (at most 0.05 worse than in float).' in text
    assert "█" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict())) == {
        "metric": "accuracy",
        "baseline": 0.9,
        "compressed": 0.4,
        "layers": [
            {"layer": "b", "value": 0.5, "drop": 0.4, "members": ["b", "c"]},
            {"layer": "a", "value": 0.9, "drop": 0.0, "members": ["a"]},
        ],
        "suggestion": {"ignored_scopes": ["b", "c"], "value": 0.875, "budget": 0.05},
        "note": "",
    }
    nothing = Sensitivity("accuracy", 0.9, 0.9, (), Suggestion((), 0.9, 0.05))
    assert "With nothing left out: 0.9" in str(nothing)
    assert Sensitivity("accuracy", 0.9, 0.9, ()).to_dict()["suggestion"] is None


def test_progress_goes_to_the_error_stream(capsys):
    model = chain()
    sensitivity(model, config(WEIGHTS), samples(model))
    assert capsys.readouterr().out == ""


BAD = {
    "mode": ({"mode": "up"}, "Expected mode 'auto', 'min' or 'max'. Received: mode='up'"),
    "no budget": ({"suggest": True}, "Expected `budget`.*Received: budget=None"),
    "budget alone": ({"budget": 0.1}, "`budget` is for `suggest=True`. Received: suggest=False"),
    "negative": ({"suggest": True, "budget": -0.1}, "budget of 0 or more. Received: budget=-0.1"),
    "infinite": ({"suggest": True, "budget": np.inf}, "budget of 0 or more. Received: budget=inf"),
    "samples": ({"samples": 0}, "samples of at least 1. Received: samples=0"),
    "metric": ({"metric": "acuracy"}, "name of a metric of Keras.*metric='acuracy'"),
    "loss": ({"metric": "loss"}, "compiled with a loss, for `metric` 'loss'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, message = BAD[case]
    model = uncompiled(chain())
    with pytest.raises(ValueError, match=message):
        sensitivity(model, config(WEIGHTS), samples(model), **arguments, verbose=False)


@pytest.mark.parametrize("name", ["rb_sparsity", "movement_sparsity", "taylor"])
def test_masks_that_only_training_brings(name):
    params = {"warmup_start_epoch": 0, "warmup_end_epoch": 1}
    params |= {"importance_regularization_factor": 0.1}
    entry = {"algorithm": name} | ({"params": params} if name == "movement_sparsity" else {})
    if name == "taylor":
        entry = PRUNING | {"params": PRUNING["params"] | {"filter_importance": "taylor"}}
    with pytest.raises(ValueError, match=f"Received: .*{name}.*only training brings"):
        sensitivity(chain(), config(entry), None, verbose=False)


def test_nothing_to_compress():
    model = chain()
    nothing = QUANTIZATION | {"ignored_scopes": ["{re}."]}
    with pytest.raises(ValueError, match="compresses at least one layer. Received: model 'chain'"):
        sensitivity(model, config(nothing), samples(model), verbose=False)


def test_a_float_model_without_a_finite_metric():
    model = chain()
    with pytest.raises(ValueError, match="finite number for the float model.*'bad', nan"):

        def bad(judged):
            return float("nan")

        sensitivity(model, config(WEIGHTS), samples(model), bad, verbose=False)


def test_ranges_need_data():
    model = chain()
    with pytest.raises(ValueError, match="quantizers without a range"):
        sensitivity(model, config(QUANTIZATION), None, lambda judged: 1.0, verbose=False)
