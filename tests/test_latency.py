"""Pruning to a latency: on a simulated machine whose times follow FLOPs, once on the real one."""

import types

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from keras import layers

import keras_compress as kc
from keras_compress.export.benchmark import Latency
from keras_compress.export.layer_times import layer_times
from keras_compress.graph.flops import flops
from keras_compress.graph.trace import trace
from keras_compress.training import latency
from keras_compress.training.latency import LatencyTable, LatencyTarget

OVERHEAD = 0.5  # milliseconds of every call
INT8 = 0.4  # share of its float time that a quantized layer takes


def network():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(32, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(64, 3, activation="relu", name="second")(x)
    x = layers.Conv2D(64, 3, activation="relu", name="third")(x)
    outputs = layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="network")


def compressed(target, *more, **params):
    params = {"pruning_latency_target": target, "schedule": "baseline", "round_to": 1} | params
    algorithm = {"algorithm": "filter_pruning", "params": params | {"prune_first_conv": True}}
    config = {"compression": [algorithm, *more]}
    return kc.compress_model(network(), config, verbose=False)


@pytest.fixture
def machine(monkeypatch):
    """Replace export, profile and measurement: a layer takes a millisecond per million FLOPs."""
    models = {}

    def times_of(model):
        graph = trace(model)
        rounded = any(type(layer).__name__ == "FakeQuantize" for layer in model.layers)
        factor = 1e-6 * (INT8 if rounded else 1.0)
        return {node.name: factor * flops(node) for node in graph.nodes}

    def benchmark(paths, calls):
        totals = [OVERHEAD + sum(models[path].values()) for path in paths]
        latencies = [Latency("", 1.1 * total, 0.1, total, 1e3 / total) for total in totals]
        return types.SimpleNamespace(latencies=latencies)

    monkeypatch.setattr(
        latency, "export", lambda model, path, verify: models.update({path: times_of(model)})
    )
    monkeypatch.setattr(latency, "layer_times", lambda path, graph: models[path] | {"": OVERHEAD})
    monkeypatch.setattr(latency, "benchmark", benchmark)
    return times_of


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("all_weights", [False, True])
def test_the_latency_asked_for_is_met(machine, target, all_weights):
    model = compressed(target, all_weights=all_weights)
    found = LatencyTarget(**model.progress["filter_pruning"]["latency"])
    assert abs(found.removed - target) <= 0.05
    totals = [OVERHEAD + sum(machine(each).values()) for each in (network(), kc.strip(model))]
    assert np.allclose([found.float_ms, found.ms], totals)
    assert found.median == pytest.approx(1.1 * found.ms)


def test_the_float_model_is_the_reference_of_a_quantized_one(machine):
    quantization = {"algorithm": "quantization"}
    model = compressed(0.5, quantization)
    found = LatencyTarget(**model.progress["filter_pruning"]["latency"])
    assert found.level == 0.0 and found.removed > 0.5  # fast enough before any pruning
    model = compressed(0.7, quantization)
    found = LatencyTarget(**model.progress["filter_pruning"]["latency"])
    assert 0 < found.level < 0.7 and abs(found.removed - 0.7) <= 0.05


def test_quantizers_that_wait_for_their_epoch_are_measured_as_they_will_be(machine):
    levels = []
    for staged in ({}, {"weights_quant_start_epoch": 3, "activations_quant_start_epoch": 2}):
        model = compressed(0.7, {"algorithm": "quantization", "params": staged})
        levels.append(LatencyTarget(**model.progress["filter_pruning"]["latency"]))
        assert all(quantizer.is_on for quantizer in model.quantizers()) is not bool(staged)
    assert levels[0] == levels[1]


def test_the_schedule_leads_to_the_level_that_was_found(machine):
    model = compressed(0.5, schedule="exponential", pruning_steps=2)
    algorithm = model.config.algorithms[0]
    assert kc.strip(model).count_params() == network().count_params()
    algorithm.begin_epoch(model, 1)
    found = LatencyTarget(**model.progress["filter_pruning"]["latency"])
    assert OVERHEAD + sum(machine(kc.strip(model)).values()) == pytest.approx(found.ms)


def test_out_of_reach_is_refused_with_numbers(machine):
    with pytest.raises(kc.ConfigError, match=r"takes 0\.\d+ ms, 9\d% less.*target=0.999"):
        compressed(0.999, round_to=8)


def test_plan_says_that_sizes_are_an_estimate():
    config = {"algorithm": "filter_pruning", "params": {"pruning_latency_target": 0.5}}
    assert "an estimate by FLOPs" in str(kc.plan(network(), {"compression": config}))


def test_a_table_is_linear_between_the_widths_that_were_measured():
    table = LatencyTable({"a": (np.array([8, 16]), np.array([1.0, 3.0]))}, rest=0.5)
    assert [table.predict({"a": n}) for n in (8, 12, 16)] == [1.5, 2.5, 3.5]
    assert table.predict({"a": 4}) == 1.5  # narrower than any: the narrowest


def test_every_operation_of_an_ir_is_timed_as_often_as_asked(tmp_path):
    model = network()
    kc.export(model, tmp_path / "model.xml", verify=False)
    counts = layer_times(tmp_path / "model.xml", trace(model), calls=3, of_calls=len)
    assert {"first", "second", "third", "head"} <= set(counts)
    assert set(counts) <= {"", *(layer.name for layer in model.layers)}
    assert all(count > 0 and count % 3 == 0 for count in counts.values())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="each of its exports would start a process")
def test_on_this_machine(tmp_path, monkeypatch):
    """Only that it runs and is kept: times are not asserted."""
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    monkeypatch.setattr(latency, "CALLS", 5)
    monkeypatch.setattr(latency, "FARTHEST", 1.0)  # a busy machine is no reason to fail
    model = compressed(0.3, round_to=8)
    found = LatencyTarget(**model.progress["filter_pruning"]["latency"])
    assert 0 <= found.level < 1 and found.ms > 0 and found.spread >= 0
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.progress["filter_pruning"] == model.progress["filter_pruning"]
