"""The report: every number from its closed form, in compressed, stripped and plain models."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_compress as kc
from keras_compress.compressed_model import quantizers_of

CONFIG = {"compression": {"algorithm": "quantization"}}


def network():
    """Conv 3x3 stride 2, depthwise 3x3, transposed 2x2, dense; each with a bias, 9x9x3 inputs."""
    inputs = keras.Input((9, 9, 3), name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2DTranspose(4, 2, strides=2, name="transposed")(x)
    x = layers.Flatten(name="flatten")(x)
    outputs = layers.Dense(6, name="dense")(x)
    return keras.Model(inputs, outputs, name="network")


# name: (weights and biases, FLOPs per sample, kernel size, scales), worked out by hand.
EXPECTED = {
    "conv": (3 * 3 * 3 * 8 + 8, 2 * 3 * 3 * 3 * 8 * 5 * 5, 3 * 3 * 3 * 8, 8),
    "depthwise": (3 * 3 * 8 + 8, 2 * 3 * 3 * 8 * 5 * 5, 3 * 3 * 8, 8),
    "transposed": (2 * 2 * 8 * 4 + 4, 2 * 2 * 2 * 8 * 4 * 5 * 5, 2 * 2 * 8 * 4, 4),
    "dense": (10 * 10 * 4 * 6 + 6, 2 * 10 * 10 * 4 * 6, 10 * 10 * 4 * 6, 6),
}


@pytest.fixture
def data():
    return np.random.default_rng(0).normal(size=(8, 9, 9, 3)).astype("float32")


def compressed(model, data, **options):
    algorithm = {"algorithm": "quantization"} | options
    return kc.compress_model(model, {"compression": algorithm}, data=data, verbose=False)


def by_name(report):
    return {layer.layer: layer for layer in report.layers}


def test_plain_model_has_closed_form_numbers():
    report = kc.report(network())
    rows = by_name(report)
    for name, (parameters, flops, _, _) in EXPECTED.items():
        assert (rows[name].parameters, rows[name].flops) == (parameters, flops)
        assert (rows[name].weight_bits, rows[name].activation_bits) == (None, None)
        assert rows[name].bytes_before == rows[name].bytes_after == 4 * parameters
    assert rows["norm"].parameters == 4 * 8
    assert rows["relu"].flops == rows["norm"].flops == 5 * 5 * 8
    assert "flatten" not in rows
    assert report.parameters == network().count_params()
    assert report.flops == sum(e[1] for e in EXPECTED.values()) + 2 * 5 * 5 * 8
    assert report.bytes_after == report.bytes_before == 4 * report.parameters
    assert report.left_alone == ()


@pytest.mark.parametrize("bits, stored", [(8, 8), (5, 8), (4, 4), (3, 4), (2, 2)])
def test_compressed_model_counts_bits_and_scales(data, bits, stored):
    report = kc.report(compressed(network(), data, weights={"bits": bits}))
    rows = by_name(report)
    for name, (parameters, flops, kernel, scales) in EXPECTED.items():
        assert (rows[name].parameters, rows[name].flops) == (parameters, flops)
        assert (rows[name].weight_bits, rows[name].activation_bits) == (bits, 8)
        bias = parameters - kernel
        assert rows[name].bytes_after == kernel * stored // 8 + 4 * scales + 4 * bias
    assert rows["conv"].type == "Conv2D"
    assert report.bytes_before == 4 * network().count_params()
    assert report.bytes_after == sum(row.bytes_after for row in report.layers)


def test_stripped_model_reads_widths_off_the_values(data):
    for bits, stored in ((8, 8), (4, 4), (2, 2)):
        model = compressed(network(), data, weights={"bits": bits})
        before, after = by_name(kc.report(model)), by_name(kc.report(kc.strip(model)))
        assert after["dense"].weight_bits == stored
        assert after["dense"].activation_bits == 8
        assert after["dense"].bytes_after == before["dense"].bytes_after


@pytest.mark.parametrize("shift, fits", [(0.0, False), (0.4, False), (-1.0, True)])
def test_asymmetric_weights_with_an_offset_stay_float_in_the_file(data, shift, fits):
    model = network()
    dense = model.get_layer("dense")
    random = np.random.default_rng(1)
    # Codes around zero of a full 8-bit grid with a zero of its own pass 127; 4-bit ones never do.
    dense.kernel.assign(random.uniform(-1, 1, dense.kernel.shape) + shift)
    overrides = {"weights": {"dense": {"bits": 4}}} if fits else {}
    model = compressed(model, data, weights={"mode": "asymmetric"}, scope_overrides=overrides)
    parameters, _, kernel, scales = EXPECTED["dense"]
    stored = kernel + 4 * scales if fits else 4 * kernel
    for described in (model, kc.strip(model)):
        row = by_name(kc.report(described))["dense"]
        assert row.bytes_after == stored + 4 * (parameters - kernel)
        assert row.weight_bits == (4 if fits and described is model else 8)


def test_separable_and_shared_layers_and_embeddings():
    inputs = keras.Input((6, 6, 2))
    shared = layers.Conv2D(2, 1, use_bias=False, name="shared")
    x = layers.SeparableConv2D(2, 3, padding="same", name="separable")(shared(shared(inputs)))
    rows = by_name(kc.report(keras.Model(inputs, x)))
    assert (rows["shared"].parameters, rows["shared"].flops) == (4, 2 * (2 * 4 * 36))
    assert rows["separable-depthwise"].parameters == 18
    assert rows["separable-depthwise"].flops == 2 * 18 * 36
    assert (rows["separable-pointwise"].parameters, rows["separable-pointwise"].flops) == (6, 288)

    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 4, name="table")(tokens)
    row = by_name(kc.report(keras.Model(tokens, layers.Dense(3)(x))))["table"]
    assert (row.parameters, row.flops, row.activation_bits) == (44, 0, None)


def test_layers_left_alone_come_with_reason_and_share(data):
    model = compressed(network(), data, ignored_scopes=["dense"])
    report = kc.report(model)
    (row,) = report.left_alone
    assert row.layer == "dense"
    assert "scopes" in row.reason
    assert (row.weight_bits, row.bytes_after) == (None, row.bytes_before)
    assert report.share(row) == report.float_share == EXPECTED["dense"][1] / report.flops
    assert report.float_share == pytest.approx(model.plan["float_share"])
    text = str(report)
    assert "Left in float" in text and row.reason in " ".join(text.split())


def test_report_survives_saving(data, tmp_path):
    model = compressed(network(), data)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert kc.report(loaded) == kc.report(model)


def test_dict_is_json_and_has_totals(data):
    report = kc.report(compressed(network(), data, ignored_scopes=["dense"]))
    result = json.loads(json.dumps(report.to_dict()))
    assert result["model"] == "network"
    for name in ("parameters", "flops", "bytes_before", "bytes_after"):
        assert result[name] == getattr(report, name) == sum(row[name] for row in result["layers"])
    assert [entry["layer"] for entry in result["left_alone"]] == ["dense"]
    assert result["float_share"] == pytest.approx(result["left_alone"][0]["share"])


def test_rendering_shows_every_layer_and_the_totals(data):
    report = kc.report(compressed(network(), data))
    for rendered in (str(report), report._repr_html_()):
        assert all(name in rendered for name in EXPECTED)
        assert f"{report.flops:,}" in rendered
        assert f"{report.bytes_after:,}" in rendered


def test_a_model_without_ranges_is_reported_too():
    model = kc.compress_model(network(), CONFIG)
    assert not all(quantizer.calibrated for quantizer in quantizers_of(model))
    assert by_name(kc.report(model))["conv"].activation_bits == 8


def test_needs_a_built_keras_model():
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        kc.report("model.keras")
    with pytest.raises(ValueError, match="Expected a built model"):
        kc.report(keras.Sequential([layers.Dense(3)]))
