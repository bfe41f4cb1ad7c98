"""verify and benchmark: what is compared, measured, shown and written."""

import json
import math

import keras
import models
import numpy as np
import pytest
from export_helpers import IMAGE, compressed, images, network

import keras_compress as kc
from keras_compress.export import benchmark
from keras_compress.export.precisions import LayerPrecision, eight_bit_share
from keras_compress.export.verify import agreement, random_inputs
from keras_compress.graph.flops import flops
from keras_compress.graph.trace import trace


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("verify") / "model.xml"
    model = network()
    kc.export(model, path, verify=False)
    return model, path


def test_the_report_counts_compares_and_is_written(exported):
    model, path = exported
    report = kc.verify(model, path, images(20), samples=12)
    assert report.samples == 12
    assert [output.name for output in report.outputs] == ["logits", "auxiliary"]
    assert report.relative == max(output.relative for output in report.outputs) < 1e-5
    assert report.outputs[0].top1 == 1.0
    assert report.outputs[1].top1 is None  # three axes
    written = json.loads(path.with_suffix(".verify.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert (written["layers_8_bit"], written["layers_total"]) == (0, 7)
    assert written["flops_8_bit"] == 0.0


def test_flops_of_the_file_are_those_of_the_layers(exported):
    model, path = exported
    nodes = trace(model).layer_nodes()
    for layer in kc.verify(model, path, samples=1).layers:
        assert layer.flops == flops(nodes[layer.layer]) > 0


def test_share_of_flops():
    layers = [
        LayerPrecision("a", "Convolution", "u8", 30),
        LayerPrecision("b", "MatMul", "f32", 10),
    ]
    assert eight_bit_share(layers) == 0.75
    assert eight_bit_share([]) == 0.0


def test_the_report_is_printed_as_tables(exported):
    text = str(kc.verify(*exported, samples=4))
    assert "4 samples" in text
    assert "0 of 7 weighted operations run in 8 bits" in text
    assert all(word in text for word in ("logits", "depthwise", "Convolution", "f32"))


def test_another_models_file_is_told_apart(exported):
    other = network()
    kernel = np.random.default_rng(1).normal(size=(16, 10))
    other.get_layer("logits").kernel.assign(kernel.astype("float32"))
    report = kc.verify(other, exported[1])
    assert report.relative > 0.1
    assert report.outputs[0].top1 < 0.9


def test_a_suspicious_difference_is_logged(exported, tmp_path, monkeypatch, caplog):
    from keras_compress import export as export_function

    module = __import__("sys").modules[export_function.__module__]
    monkeypatch.setattr(module, "SUSPICIOUS", -1.0)
    kc.export(exported[0], tmp_path / "model.xml")
    assert "differs from the trained model" in caplog.text


def test_a_missing_file_is_refused(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected an exported model"):
        kc.verify(exported[0], tmp_path / "missing.xml")


def test_a_file_openvino_cannot_read_is_named(exported, tmp_path):
    (tmp_path / "broken.xml").write_text("<net>")
    with pytest.raises(RuntimeError, match=r"OpenVINO cannot read .*broken.xml"):
        kc.verify(exported[0], tmp_path / "broken.xml")


def test_data_that_does_not_fit_is_refused(exported):
    with pytest.raises(ValueError, match=f"does not fit the model's input '{IMAGE}'"):
        kc.verify(*exported, np.zeros((4, 5, 5, 3), "float32"))


def test_random_inputs_fit_the_model():
    graph = trace(models.make("tokens"))
    (tokens,) = random_inputs(graph, 50)
    size = next(n.op.input_dim for n in graph.nodes if isinstance(n.op, keras.layers.Embedding))
    assert tokens.dtype == graph.inputs[0].dtype
    assert 0 <= tokens.min() <= tokens.max() < size


def test_random_inputs_span_the_quantizers_range():
    model = compressed(data=images() * 100)
    (x,) = random_inputs(trace(model), 50)
    assert 200 < np.abs(x).max() < 1000


def test_random_inputs_know_booleans_and_open_sizes():
    flags, picture = keras.Input((3,), dtype="bool"), keras.Input((None, None, 2))
    joined = keras.ops.sum(picture, axis=(1, 2, 3), keepdims=False)[:, None]
    model = keras.Model([flags, picture], keras.ops.where(flags, joined, 0.0))
    a, b = random_inputs(trace(model), 7)
    assert (a.dtype, a.shape) == (np.dtype(bool), (7, 3))
    assert b.shape == (7, 32, 32, 2)


@pytest.mark.parametrize(
    ("received", "largest", "relative"),
    [([[1.0, 3.0]], 0.0, 0.0), ([[1.0, 2.0]], 1.0, 0.5), ([[4.0, 3.0]], 3.0, 1.5)],
)
def test_agreement_is_relative_to_the_range(received, largest, relative):
    result = agreement("y", [[1.0, 3.0]], received)
    assert (result.largest, result.relative) == (largest, relative)


def test_agreement_with_a_constant_output():
    assert agreement("y", np.ones((2, 3)), np.ones((2, 3))).relative == 0
    assert agreement("y", np.ones((2, 3)), np.zeros((2, 3))).relative == math.inf


def test_differences_that_are_no_number_become_null(exported):
    model = keras.models.clone_model(exported[0])
    model.get_layer("logits").bias.assign(np.full(10, np.nan))
    report = kc.verify(model, exported[1])
    assert report.to_dict()["outputs"][0]["largest"] is None


def test_models_are_measured_side_by_side(exported):
    report = benchmark([exported[1], exported[1]], batch_size=2, calls=5, warm_up=1, threads=1)
    assert len(report.latencies) == 2
    for latency in report.latencies:
        assert 0 < latency.fastest <= latency.median
        assert latency.throughput == pytest.approx(2e3 / latency.median)
    assert report.speedup(0) == 1
    assert report.to_dict()["calls"] == 5
    assert "speed-up" in str(report)


@pytest.mark.parametrize("arguments", [([], {}), (["model.xml"], {"calls": 0})])
def test_nothing_to_measure_is_refused(arguments):
    paths, options = arguments
    with pytest.raises(ValueError, match="at least one path and one call"):
        benchmark(paths, **options)
