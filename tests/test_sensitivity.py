"""Sensitivity: figures against layers compressed by themselves, and what is read of the data."""

import json

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers
from sensitivity_helpers import (
    BINARIZATION,
    CONST,
    NO_ADAPTATION,
    PRUNING,
    QUANTIZATION,
    SPARSITY,
    STAGED,
    WEIGHTS,
    Recorder,
    chain,
    config,
    final,
    give_ranges,
    residual,
    samples,
    scoped,
)

import keras_compress as kc
from keras_compress.graph.trace import trace
from keras_compress.sensitivity import sensitivity
from keras_compress.training.switches import Switches, with_switches

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
