"""Binarization: what is planned, and how it trains."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from binarization_helpers import (
    BINARIZED,
    WITHOUT_ADAPTATION,
    batch,
    compress,
    config,
    kernels,
    network,
    quantizer_of,
    trained,
)
from keras import layers

import keras_compress as kc
from keras_compress.binary_quantizers import BinaryActivations, BinaryWeights
from keras_compress.graph.trace import trace
from keras_compress.graph.walk import last_layers


def planned(settings=None, model=None):
    decided = kc.plan(model or network(), settings or config())
    weights = {entry.layer: entry.description for entry in decided.weights}
    edges = {(edge.name, edge.readers): edge.description for edge in decided.edges}
    return decided, weights, edges


# The plan


@pytest.mark.parametrize(
    ("mode", "text"),
    [("xnor", "one scale per filter"), ("dorefa", "one scale per tensor")],
)
def test_what_is_binarized(mode, text):
    decided, weights, edges = planned(config(mode=mode))
    assert [name for name in weights if weights[name].startswith("binary")] == BINARIZED
    assert {weights[name] for name in BINARIZED} == {f"binary, {text}"}
    assert {name for name in weights if weights[name].startswith("8 bits")} == {
        "first",
        "depthwise",
        "logits",
    }
    binary = {key for key, value in edges.items() if value.startswith("binary")}
    assert binary == {
        ("first_relu-binarize", ("second",)),
        ("second_relu-binarize", ("third",)),
        ("pool-binarize", ("pointwise",)),
        ("flat-binarize", ("hidden",)),
    }
    eight = {readers for (_, readers), value in edges.items() if value.startswith("8 bits")}
    assert eight == {("first",), ("add",), ("max_pooling2d",), ("logits",)}
    assert not decided.untouched
    note = "4 layers are binarized; everything else stays with quantization. Left to it by default"
    assert note in decided.notes[0] and "logits (the last layer before an out" in decided.notes[0]


def test_ternary_weights_keep_activations_of_eight_bits():
    decided, weights, edges = planned(config(mode="ternary"))
    assert {weights[name] for name in BINARIZED} == {"ternary, one scale per filter"}
    assert all(text.startswith("8 bits") for text in edges.values())
    assert {reader for _, readers in edges for reader in readers} >= {"second", "third", "flat"}
    assert not decided.untouched


def test_first_and_last_layers_can_be_binarized_too():
    _, weights, edges = planned(config(binarize_first_and_last=True))
    assert {name for name in weights if weights[name].startswith("binary")} == {
        "first",
        "logits",
        *BINARIZED,
    }
    assert ("image-binarize", ("first",)) in edges


def test_scopes_choose_the_layers():
    _, weights, _ = planned(config(ignored_scopes=["third", "{re}point"]))
    assert weights["third"].startswith("8 bits") and weights["second"].startswith("binary")
    _, weights, _ = planned(config(target_scopes=["hidden"]))
    assert [name for name in weights if weights[name].startswith("binary")] == ["hidden"]


def test_layers_that_read_one_tensor_share_a_binarizer():
    inputs = keras.Input((8,))
    x = layers.ReLU(name="shared")(layers.Dense(8)(inputs))
    both = [layers.Dense(8, name=name)(x) for name in ("left", "right")]
    model = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()(both)))
    _, _, edges = planned(model=model)
    assert ("shared-binarize", ("left", "right")) in edges


def test_last_layers_are_those_with_none_behind():
    model = network()
    assert last_layers(trace(model)) == {"logits"}
    outputs = [layers.Dense(2, name="head")(model.get_layer("flat").output), model.output]
    assert last_layers(trace(keras.Model(model.input, outputs))) == {"logits", "head"}


def test_quantization_leaves_alone_what_is_claimed():
    quantization = {
        "algorithm": "quantization",
        "weights": {"bits": 4},
        "ignored_scopes": ["second", "depthwise"],
        "initializer": WITHOUT_ADAPTATION,
    }
    for order in (0, 1):
        settings = config(quantization)
        if order:
            settings["compression"].reverse()
        decided, weights, edges = planned(settings)
        assert weights["second"].startswith("binary") and weights["first"].startswith("4 bits")
        assert ("first_relu-binarize", ("second",)) in edges and len(weights) == 6
        reasons = {entry.layer: entry.reason for entry in decided.untouched}
        assert reasons == {"depthwise": "excluded by the scopes of the configuration"}
        model = compress(settings)
        assert all(quantizer.calibrated for quantizer in model.quantizers())


def test_ternary_layers_that_quantization_ignores_have_a_float_input():
    quantization = {"algorithm": "quantization", "ignored_scopes": ["hidden"]}
    decided, weights, _ = planned(config(quantization, mode="ternary"))
    assert weights["hidden"].startswith("ternary")
    assert {e.layer: e.reason for e in decided.untouched} == {
        "hidden": "its input is not quantized"
    }


def test_a_model_with_nothing_to_binarize():
    inputs = keras.Input((8, 8, 3))
    x = layers.DepthwiseConv2D(3, name="depthwise")(layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    with pytest.raises(kc.ConfigError, match="layers that can be binarized.*3 layers") as caught:
        kc.plan(model, config())
    for text in (
        "'conv': the first layer behind an input",
        "'depthwise': only convolutions and dense layers are binarized",
        "'head': the last layer before an output",
    ):
        assert text in str(caught.value)
    with pytest.raises(kc.ConfigError, match="'hidden': excluded by the scopes"):
        kc.plan(network(), config(target_scopes=["first"]))


def test_scopes_that_match_nothing():
    with pytest.raises(kc.ConfigError, match="ignored_scopes: 'secnd' matches no node"):
        kc.plan(network(), config(ignored_scopes=["secnd"]))
    initializer = {"range": {"type": "min_max", "target_scopes": ["first_reluu"]}}
    with pytest.raises(kc.ConfigError, match="initializer.range.target_scopes: 'first_reluu'"):
        kc.plan(network(), config(initializer=initializer))
    kc.plan(network(), config(ignored_scopes=["secnd"], validate_scopes=False))


def test_unknown_modes_are_refused():
    with pytest.raises(kc.ConfigError, match="mode.*xnor.*Received: mode='xor'"):
        kc.plan(network(), config(mode="xor"))


def test_widths_are_not_searched_for():
    initializer = {"precision": {"type": "hawq"}}
    statuses = {
        key.key: key for key in kc.Config.load(config(initializer=initializer)).key_report()
    }
    found = statuses["compression[0].initializer.precision.type"]
    assert found.status == "ignored" and "binarizers have one width" in found.reason


# Calibration and training


def test_the_scale_starts_at_the_smallest_of_the_largest_thousandth():
    model, x = compress(), batch()[0]
    first = keras.Model(model.input, model.get_layer("first_relu-binarize").input)
    values = numpy(first(x))
    scale = model.get_layer("first_relu-binarize").quantizer.step()
    np.testing.assert_allclose(scale, np.percentile(values, 99.9), rtol=0.02)


def test_calibration_sees_the_float_activations():
    plain = network()
    model = compress(model=plain)
    for name in ("second_relu", "pool"):
        values = numpy(keras.Model(plain.input, plain.get_layer(name).output)(batch()[0]))
        scale = model.get_layer(f"{name}-binarize").quantizer.step()
        np.testing.assert_allclose(scale, np.percentile(values, 99.9), rtol=0.05)
    assert all(quantizer.observer is None for quantizer in model.quantizers())


def test_the_estimator_can_be_chosen():
    entry = {"type": "min_max", "target_quantizer_group": "activations", "num_init_samples": 16}
    model = compress(config(initializer=WITHOUT_ADAPTATION | {"range": entry}))
    edge = model.get_layer("first_relu-binarize")
    values = numpy(keras.Model(model.input, edge.input)(batch()[0]))
    assert edge.quantizer.step() > np.percentile(values, 99.95)
    (algorithm,) = model.config.algorithms
    assert algorithm.activation_spec("first_relu").range.num_init_samples == 16


@pytest.mark.parametrize("mode", ["xnor", "dorefa", "ternary"])
def test_training(mode):
    model = trained(config(mode=mode), epochs=12)
    losses = model.history.history
    assert losses["loss"][-1] < losses["loss"][0]
    tensors = 0 if mode == "ternary" else 4
    assert losses["compression/binarized_weights"] == [4] * 12
    assert losses["compression/binarized_activations"] == [tensors] * 12
    assert losses["compression/quantizers"] == [len(model.quantizers())] * 12
    for name in BINARIZED:
        kernel = kernels(model)[name]
        magnitudes = [np.unique(np.abs(kernel[..., i])) for i in range(kernel.shape[-1])]
        assert all(len(each[each > 0]) == 1 for each in magnitudes)
        assert (kernel == 0).any() == (mode == "ternary")
    for name in ("second", "hidden") if tensors else ():
        edge = model.get_layer(name).input
        assert len(np.unique(numpy(keras.Model(model.input, edge)(batch()[0])))) == 2


def test_without_data_the_first_batches_set_the_scales():
    model = trained(data=None)
    assert all(quantizer.calibrated for quantizer in model.quantizers())
    assert not model.run_eagerly
    edge = model.get_layer("first_relu-binarize").quantizer
    assert 0.5 < edge.step() < 20


def test_a_short_training_makes_do_with_what_it_saw():
    model = trained(data=None, epochs=1, steps_per_epoch=1)
    assert all(quantizer.calibrated for quantizer in model.quantizers())


def test_the_multiplier_of_the_learning_rate():
    model = compress(config(compression_lr_multiplier=0.5))
    quantizers = model.quantizers()
    assert {q.lr_multiplier for q in quantizers if isinstance(q, BinaryActivations)} == {0.5}


def test_stripped_model_is_plain_and_equal():
    model = trained()
    plain, x = kc.strip(model), batch(seed=1)[0]
    assert type(plain.get_layer("second")) is keras.layers.Conv2D
    np.testing.assert_array_equal(numpy(plain(x)), numpy(model(x)))
    # The mean of a compiled model may differ in its last digit: sums run in another order there.
    expected, received = (each.predict(x, verbose=0) for each in (model, plain))
    np.testing.assert_allclose(received, expected, atol=1e-3 * np.ptp(expected))


def test_saved_model_is_equal(tmp_path):
    model, x = trained(), batch(seed=1)[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert isinstance(quantizer_of(loaded, "second"), BinaryWeights)
    loaded.fit(*batch(), epochs=1, verbose=0, callbacks=[kc.callbacks.Compress()])


def test_masked_weights_stay_zero():
    sparsity = {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 1},
    }
    model = trained(config(sparsity), epochs=3)
    for name in BINARIZED:
        mask, quantizer = model.get_layer(name).transforms_of("kernel")
        kernel = kernels(model)[name]
        assert isinstance(quantizer, BinaryWeights)
        np.testing.assert_array_equal(kernel != 0, mask.mask_values())
    assert model.history.history["compression/sparsity"][-1] == pytest.approx(0.6, abs=1e-3)
    assert len(np.unique(np.abs(kernels(model)["second"][..., 0]))) == 2


def test_pruned_filters_go():
    pruning = {
        "algorithm": "filter_pruning",
        "params": {"pruning_target": 0.5, "schedule": "baseline", "num_init_steps": 0},
    }
    model = trained(config(pruning), epochs=2)
    x = batch(seed=1)[0]
    expected = numpy(model(x))
    plain, small = kc.strip(model), kc.shrink(model)
    assert plain.get_layer("second").filters == small.get_layer("second").filters == 8
    for smaller in (plain, small):
        difference = np.abs(numpy(smaller(x)) - expected).max()
        assert difference < 1e-4 * np.ptp(expected)
    assert len(np.unique(np.abs(kernels(small)["second"][..., 0]))) == 1


def test_staged_binarizers_wait_for_their_epoch():
    params = {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2}
    model = compress(config(params=params))
    on = {"weights": [], "activations": []}

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            on["weights"].append(quantizer_of(model, "second").is_on)
            on["activations"].append(model.get_layer("first_relu-binarize").quantizer.is_on)

    assert not quantizer_of(model, "second").is_on and quantizer_of(model, "first").is_on
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    callbacks = [kc.callbacks.Compress(), Watch()]
    model.fit(*batch(), epochs=4, batch_size=16, verbose=0, callbacks=callbacks)
    assert on == {"weights": [False, False, True, True], "activations": [False, True, True, True]}
