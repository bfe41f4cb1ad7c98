"""The report: every number from its closed form, in compressed, stripped and plain models."""

import json
import types

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from keras import layers

import keras_compress as kc
from keras_compress.algorithms.precision import PrecisionProblem
from keras_compress.graph.trace import trace
from keras_compress.model_facts import quantizers_of
from keras_compress.quantizers import AsymmetricQuantizer, SymmetricQuantizer

CONFIG = {"compression": {"algorithm": "quantization"}}
one_process = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="each of its exports would start a process"
)


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


# Zeros and filters


def prunable_network():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="prunable")


def pruned(*more, target=0.5):
    params = {"pruning_target": target, "schedule": "baseline", "prune_first_conv": True}
    algorithm = {"algorithm": "filter_pruning", "pruning_init": target, "params": params}
    params["round_to"] = 1
    return kc.compress_model(prunable_network(), {"compression": [algorithm, *more]}, verbose=False)


def test_zeros_are_counted_as_the_layer_uses_them():
    model = network()
    kernel = np.ones(model.get_layer("dense").kernel.shape, "float32")
    kernel[:100] = 0.0
    model.get_layer("dense").kernel.assign(kernel)
    rows = by_name(kc.report(model))
    assert rows["dense"].sparsity == 100 / 400
    assert rows["conv"].sparsity == 0.0  # though its bias is all zero
    assert rows["norm"].sparsity is None and rows["relu"].sparsity is None


def test_zeros_of_masks_and_of_rounding_count():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, use_bias=False, name="dense")])
    model.layers[0].kernel.assign([[1.0, -1.0], [0.9, 0.8], [0.1, 0.0], [0.2, -0.3]])
    sparsity = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.25,
        "params": {"schedule": "multistep", "multistep_sparsity_levels": [0.25, 0.25]},
    }
    masked = kc.compress_model(model, {"compression": sparsity}, verbose=False)
    assert by_name(kc.report(masked))["dense"].sparsity == 2 / 8
    quantization = {"algorithm": "quantization", "weights": {"bits": 2}}
    rounded = kc.compress_model(model, {"compression": quantization}, verbose=False)
    effective = rounded.get_layer("dense").effective_weight("kernel")
    assert by_name(kc.report(rounded))["dense"].sparsity == np.mean(effective == 0) > 0.25


def test_filters_of_masked_shrunk_and_stripped_models():
    expected = {"first": (16, 8), "depthwise": (16, 8), "head": (4, 4)}
    model = pruned()
    for described in (model, kc.shrink(model)):
        rows = by_name(kc.report(described))
        assert {n: (rows[n].filters, rows[n].filters_kept) for n in expected} == expected
        assert rows["norm"].filters is rows["pool"].filters is None
    rows = by_name(kc.report(kc.strip(model)))
    assert {n: (rows[n].filters, rows[n].filters_kept) for n in expected} == {
        "first": (8, 8), "depthwise": (8, 8), "head": (4, 4)
    }  # fmt: skip


def test_filters_of_plain_layers_by_their_configuration():
    rows = by_name(kc.report(network()))
    widths = {"conv": 8, "depthwise": 8, "transposed": 4, "dense": 6}
    assert {name: rows[name].filters for name in widths} == widths
    inputs = keras.Input((5, 3))
    x = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), name="einsum")(inputs)
    x = layers.LSTM(7, name="lstm")(layers.Reshape((5, 8))(x))
    rows = by_name(kc.report(keras.Model(inputs, x)))
    assert (rows["einsum"].filters, rows["lstm"].filters) == (8, 7)


def test_the_table_has_columns_of_what_there_is(data):
    plain = str(kc.report(network()))
    assert "zeros" not in plain and "filters" not in plain and "latency" not in plain
    text = str(kc.report(pruned()))
    assert "zeros" in text and "8/16" in text and "4/4" in text
    for name in ("depthwise", "DepthwiseConv2D", "BatchNormalization"):
        assert name in text


# Figures of the float model, the compressed one and the IR


def test_the_float_model_stands_beside(data):
    model = network()
    small = compressed(model, data)
    given, inferred = (kc.report(small, original=each).figures for each in (model, None))
    for first, second in (given, inferred):
        assert (first.name, second.name) == ("float", "compressed")
        assert (first.parameters, first.bytes) == (model.count_params(), 4 * model.count_params())
        assert second.bytes == kc.report(small).bytes_after
        assert first.flops == second.flops == kc.report(model).flops
    (alone,) = kc.report(model).figures
    assert alone.name == "model"
    assert "Figures" in str(kc.report(small, original=model))


def test_a_pruned_model_counts_without_its_masked_channels():
    model = pruned()
    small = kc.strip(model)
    first, second = kc.report(model).figures
    assert (first.parameters, first.bytes) == (
        prunable_network().count_params(), 4 * prunable_network().count_params()
    )  # fmt: skip
    assert second.parameters == small.count_params() < first.parameters
    assert second.flops == kc.report(small).flops < first.flops
    shrunk = kc.report(kc.shrink(model)).figures
    assert [(f.parameters, f.flops) for f in shrunk] == [
        (f.parameters, f.flops) for f in (first, second)
    ]


def test_a_pruned_model_without_ranges_counts_with_them():
    first, second = kc.report(pruned({"algorithm": "quantization"})).figures
    assert first.parameters == second.parameters


def classifier(compiled=True):
    image = keras.Input((3,), name="features")
    x = layers.Dense(8, activation="relu", name="hidden")(image)
    model = keras.Model(image, layers.Dense(3, name="scores")(x), name="classifier")
    if compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=["accuracy"])
    return model


def labelled(samples=70):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 3)).astype("float32")
    return x, x.argmax(axis=1)


@one_process
def test_metrics_are_those_of_evaluate():
    x, y = labelled()
    model = classifier()
    small = kc.compress_model(model, CONFIG, data=x, verbose=False)
    weights = np.linspace(0.5, 2.0, len(x)).astype("float32")
    for judge in (small, model):  # compiled: the compressed model, or the original alone
        if judge is small:
            small.compile("sgd", model.loss, metrics=["accuracy"])
        report = kc.report(small, original=model, data=(x, y))
        by_form = {each.name: each.metrics for each in report.figures}
        for name, each in (("float", model), ("compressed", small)):
            if each.compiled:
                expected = each.evaluate(x, y, verbose=0, return_dict=True)
                assert by_form[name] == pytest.approx(expected, abs=1e-5)
        assert by_form["IR"] == pytest.approx(by_form["compressed"], abs=1e-4)
        small = kc.compress_model(model, CONFIG, data=x, verbose=False)
    weighted = kc.report(model, data=(x, y, weights)).figures[0].metrics
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    assert weighted["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert "70 samples" in " ".join(report.notes)
    assert report.figures[-1].file_bytes > 0 and report.figures[0].latency is None


def test_metrics_of_several_inputs_and_outputs():
    features = {name: keras.Input((3,), name=name) for name in ("left", "right")}
    x = layers.Add(name="add")(list(features.values()))
    outputs = {name: layers.Dense(2, name=name)(x) for name in ("one", "two")}
    model = keras.Model(features, outputs, name="several")
    random = np.random.default_rng(0)
    inputs = {name: random.normal(size=(40, 3)).astype("float32") for name in features}
    targets = {name: random.normal(size=(40, 2)).astype("float32") for name in outputs}
    small = kc.compress_model(model, CONFIG, data=inputs, verbose=False)
    small.compile("sgd", {"one": "mse", "two": "mae"}, metrics={"two": ["mse"]})
    expected = small.evaluate(inputs, targets, verbose=0, return_dict=True)
    _, ours, exported = kc.report(small, data=(inputs, targets)).figures
    assert ours.metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert ours.metrics["two_mse"] == pytest.approx(expected["two_mse"], abs=1e-5)
    assert exported.metrics == pytest.approx(ours.metrics, abs=1e-4)


def test_metrics_need_a_compiled_model_and_labels():
    x, y = labelled()
    plain = classifier(compiled=False)
    report = kc.report(plain, data=(x, y))
    assert [each.metrics for each in report.figures] == [{}]
    assert "not compiled" in report.notes[0]
    assert kc.report(classifier(), data=x).figures[0].metrics == {}
    generator = (x[i : i + 10] for i in range(0, 70, 10))
    small = kc.compress_model(classifier(), CONFIG, data=x, verbose=False)
    whole, batched = (kc.report(small, data=each).histograms for each in (x, generator))
    assert [h.counts for h in whole if h.kind == "activation"] == [
        h.counts for h in batched if h.kind == "activation"
    ]


def test_latency_is_measured_in_turn_and_shared_among_layers():
    x, _ = labelled()
    model = classifier()
    small = kc.compress_model(model, CONFIG, data=x, verbose=False)
    report = kc.report(small, original=model, latency=True)
    by_form = {each.name: each for each in report.figures}
    assert list(by_form) == ["float", "compressed", "IR"]
    assert by_form["float"].latency > 0 and by_form["IR"].latency > 0
    assert by_form["compressed"].latency is None and by_form["IR"].spread >= 0
    assert by_form["float"].file_bytes > 4 * model.count_params()
    shares = [row.latency_share for row in report.layers]
    assert 0 < sum(shares) <= 1 + 1e-9 and min(shares) >= 0
    assert "latency" in str(report) and "ms per call" in str(report)
    assert kc.report(small, latency=True).figures[0].latency is None


# Histograms


def histogram_of(report, kind, name):
    (found,) = [each for each in report.histograms if (each.kind, each.name) == (kind, name)]
    return found


def test_weights_lie_in_the_range_of_their_quantizer():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(32, name="dense")])
    values = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    values[:4] = 0.0
    model.layers[0].kernel.assign(values)
    config = {"algorithm": "quantization", "weights": {"per_channel": False}}
    small = kc.compress_model(model, {"compression": config}, verbose=False)
    quantizer = small.get_layer("dense").transforms_of("kernel")[-1]
    quantizer.set_range(-1.5, 1.5)
    low, high = (float(end) for end in quantizer.effective_range())
    found = histogram_of(kc.report(small), "weight", "dense")
    assert (found.low, found.high, found.unit, found.bits) == (low, high, "", 8)
    assert found.zeros == 4 / 64
    assert found.below == np.mean(values < low) and found.above == np.mean(values > high)
    expected, _ = np.histogram(values[values != 0], 48, (low, high))
    assert np.abs(np.subtract(found.counts[8:-8], expected)).sum() <= 2  # a value on an edge
    assert sum(found.counts) == np.count_nonzero(values)
    assert sum(found.counts[:8]) == np.sum(values < low)


@pytest.mark.parametrize("mode, unit, ends", [
    ("symmetric", "steps", (-63, 63)), ("asymmetric", "codes", (0, 255)),
])  # fmt: skip
def test_channels_share_one_range_in_units_of_it(mode, unit, ends):
    model = keras.Sequential([keras.Input((50,)), layers.Dense(2, name="dense")])
    ramp = np.linspace(-1, 1, 50, dtype="float32")
    model.layers[0].kernel.assign(np.stack([ramp, 100 * ramp], axis=1))
    initializer = {"range": {"type": "min_max"}}
    config = {"algorithm": "quantization", "weights": {"mode": mode}, "initializer": initializer}
    small = kc.compress_model(model, {"compression": config}, verbose=False)
    found = histogram_of(kc.report(small), "weight", "dense")
    assert (found.low, found.high, found.unit) == (*ends, unit)
    assert found.below == found.above == 0.0
    inside = np.array(found.counts[8:-8])
    assert inside.sum() == 100 and inside.min() >= 1 and inside.max() <= 4


def test_binary_weights_are_in_units_of_their_scale():
    inputs = keras.Input((6, 6, 3))
    x = inputs
    for name in ("first", "middle", "last"):
        x = layers.Conv2D(4, 3, padding="same", activation="relu", name=name)(x)
    samples = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype("float32")
    config = {"compression": {"algorithm": "binarization"}}
    small = kc.compress_model(keras.Model(inputs, x), config, data=samples, verbose=False)
    found = histogram_of(kc.report(small, data=samples), "weight", "middle")
    assert (found.low, found.high, found.unit, found.bits) == (-1.0, 1.0, "scales", 1)
    assert found.below is found.above is None
    kernel = small.get_layer("middle").raw_weight("kernel").numpy()
    scale = np.abs(kernel).mean(axis=(0, 1, 2))
    assert sum(found.counts[8:-8]) == np.sum(np.abs(kernel) <= scale)


def test_activations_are_those_before_rounding(data):
    small = compressed(network(), data)
    quantizer = small.get_layer("image-fake_quantize").quantizer
    quantizer.set_range(-1.0, 1.0)
    found = histogram_of(kc.report(small, data=data), "activation", "image")
    low, high = (float(end) for end in quantizer.effective_range())
    assert (found.low, found.high) == (low, high)
    assert found.above == pytest.approx(np.mean(data > high)) and sum(found.counts) == data.size
    names = {each.name for each in kc.report(small, data=data).histograms}
    assert {"image", "relu", "depthwise", "conv", "dense"} <= names
    assert not any(each.kind == "activation" for each in kc.report(small).histograms)
    stripped = kc.report(kc.strip(small), data=data).histograms
    assert [each.kind for each in stripped] == ["activation"] * len(stripped) != []


# What else is kept


def sensitivity_stub(suggestion=True):
    rows = [("conv", 0.80, 0.12), ("dense", 0.93, -0.01), ("depthwise", float("nan"), float("inf"))]
    tip = types.SimpleNamespace(ignored_scopes=("conv",), value=0.915)
    return types.SimpleNamespace(
        metric="accuracy",
        baseline=0.92,
        compressed=0.75,
        layers=tuple(types.SimpleNamespace(layer=a, value=b, drop=c) for a, b, c in rows),
        suggestion=tip if suggestion else None,
    )


def test_history_sensitivity_and_keys_are_kept(data):
    model = network()
    model.compile("sgd", "mse")
    history = model.fit(data, np.zeros((8, 6)), epochs=2, verbose=0)
    report = kc.report(compressed(model, data), history=history, sensitivity=sensitivity_stub())
    result = json.loads(json.dumps(report.to_dict()))
    assert result["history"] == {"loss": history.history["loss"]}
    assert result["sensitivity"]["suggestion"] == {"ignored_scopes": ["conv"], "value": 0.915}
    assert result["sensitivity"]["layers"][2] == {"layer": "depthwise", "value": None, "drop": None}
    assert {"key": "compression[0].algorithm", "status": "honoured", "reason": ""} in result["keys"]
    assert [each["name"] for each in result["figures"]] == ["float", "compressed"]
    assert len(result["histograms"][0]["counts"]) == 64
    assert {"sparsity", "filters", "filters_kept", "latency_share"} <= set(result["layers"][0])
    without = kc.report(model, history={"loss": [1.0]}, sensitivity=sensitivity_stub(False))
    assert without.to_dict()["sensitivity"]["suggestion"] is None


# Widths in the IR


@pytest.mark.parametrize("quantizer, stored", [
    (SymmetricQuantizer(2), 2), (SymmetricQuantizer(2, signed=False), 2),
    (SymmetricQuantizer(4), 4), (SymmetricQuantizer(4, signed=False), 8),
    (SymmetricQuantizer(5), 8), (SymmetricQuantizer(8, half_range=True), 8),
    (SymmetricQuantizer(8, signed=False, narrow_range=True), 32), (AsymmetricQuantizer(2), 4),
    (AsymmetricQuantizer(3), 4), (AsymmetricQuantizer(4), 8), (AsymmetricQuantizer(7), 8),
    (AsymmetricQuantizer(8), 32),
])  # fmt: skip
def test_widths_that_hold_the_codes(quantizer, stored):
    assert quantizer.stored_bits == stored


def test_the_byte_budget_knows_that_asymmetric_weights_stay_float(data):
    """What the search counts with is what the report finds in the model, and so the IR's file."""
    options = {"weights": {"mode": "asymmetric"}}
    config = kc.Config.load({"compression": {"algorithm": "quantization"} | options})
    graph = trace(network())
    problem = PrecisionProblem(config.algorithms[0], graph, config)
    searched = {layer.name: layer for layer in problem.layers}
    for bits, per_weight in ((8, 32), (4, 8), (3, 4), (2, 4)):
        widths = {"mode": "asymmetric", "bits": bits}
        rows = by_name(kc.report(compressed(network(), data, weights=widths)))
        for name, (parameters, _, kernel, scales) in EXPECTED.items():
            steps = 4 * scales if bits < 8 else 0
            assert searched[name].bytes(bits) == kernel * per_weight // 8 + steps
            counted = rows[name].bytes_after - 4 * (parameters - kernel)
            assert searched[name].bytes(bits) >= counted  # of few bits, codes may need fewer still
            assert searched[name].bytes(bits) == counted or bits in (2, 4)


def test_a_byte_budget_for_asymmetric_weights_holds_in_the_model(data, tmp_path):
    names = ("conv", "depthwise", "transposed", "dense")
    traces = tmp_path / "traces.json"
    traces.write_text(json.dumps({f"{name}/kernel": 1.0 for name in names}))
    budget = {"bytes": 4000}  # less than the kernels in float32, which 8 bits would take
    precision = {"type": "hawq", "traces_per_layer_path": str(traces), "budget": budget}
    model = compressed(
        network(), data, weights={"mode": "asymmetric"}, initializer={"precision": precision}
    )
    rows = by_name(kc.report(model))
    biases = sum(EXPECTED[name][0] - EXPECTED[name][2] for name in names)
    assert sum(rows[name].bytes_after for name in names) - 4 * biases <= 4000
    assert any(rows[name].weight_bits < 8 for name in names)


# Errors


@pytest.mark.parametrize("arguments, kind, message", [
    ({"original": "float.keras"}, TypeError, "Expected a Keras 3 model"),
    ({"history": [1.0]}, TypeError, "keras.callbacks.History"),
    ({"history": {"loss": [1.0, "low"]}}, ValueError, r"history\['loss'\]"),
    ({"history": {"loss": 1.0}}, ValueError, "one number per epoch"),
    ({"sensitivity": 0.3}, TypeError, "without metric, baseline"),
    ({"latency": 5}, TypeError, "Expected True or False"),
    ({"data": np.zeros((4, 5), "float32")}, ValueError, "does not fit the model's input"),
    ({"data": []}, ValueError, "gave none"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        kc.report(network(), **arguments)


def test_the_original_must_be_the_float_model(data):
    model = network()
    small = compressed(model, data)
    with pytest.raises(ValueError, match="which is compressed itself"):
        kc.report(small, original=small)
    with pytest.raises(ValueError, match="with the inputs .*image.* Received: original='prunable'"):
        kc.report(small, original=prunable_network())


@pytest.mark.parametrize("arguments", [{"latency": True}, {"data": np.zeros((4, 9, 9, 3))}])
def test_measuring_needs_ranges(arguments):
    with pytest.raises(ValueError, match="quantizers without a range"):
        kc.report(kc.compress_model(network(), CONFIG), **arguments)
