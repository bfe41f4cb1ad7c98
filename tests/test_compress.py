"""compress_model, strip, saving and resuming, and every way in which input can be wrong."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from backend_helpers import numpy, one_step_per_execution

import keras_compress as kc
from keras_compress.layers import CompressedLayer, FakeQuantConv2D, FakeQuantDense, FakeQuantize

CONFIG = {
    "compression": {
        "algorithm": "quantization",
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    }
}


def network():
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = shortcut = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.SeparableConv2D(4, 3, padding="same", name="separable")(x)
    x = keras.layers.Add(name="add")([x, shortcut])
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="network")


def batch(samples=32, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 8, 8, 3)).astype("float32")
    return x, random.integers(0, 3, samples)


def compiled(model, optimizer="adam"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


def compress(model=None, config=CONFIG, data=True):
    samples = batch()[0] if data is True else data
    return kc.compress_model(model or network(), config, data=samples, verbose=False)


def test_the_model_is_cloned_and_left_alone():
    model = compiled(network())
    config = model.get_config()
    weights = [numpy(w).copy() for w in model.weights]
    compressed = compress(model)
    compiled(compressed).fit(*batch(), verbose=0)
    assert model.get_config() == config
    for before, variable in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(before, numpy(variable))
    names = {layer.name for layer in compressed.layers}
    assert {layer.name for layer in model.layers} - names == {"separable"}
    assert {"separable-depthwise", "separable-pointwise", "relu-fake_quantize"} <= names
    assert compressed.input.name == "image" and compressed.name == "network"


def test_weights_are_copied_bitwise_and_output_stays_close():
    model = network()
    initializer = CONFIG["compression"]["initializer"] | {"range": {"type": "min_max"}}
    compressed = compress(model, with_options(initializer=initializer))
    np.testing.assert_array_equal(
        numpy(compressed.get_layer("first").raw_weight("kernel")),
        numpy(model.get_layer("first").kernel),
    )
    x = batch()[0]
    expected, received = model.predict(x, verbose=0), compressed.predict(x, verbose=0)
    assert 0 < np.abs(expected - received).max() < 0.03 * np.ptp(expected)


def test_wide_enough_grids_give_the_float_model_back():
    """Without overflow fix, halving the step twice must cut the error by about four."""
    model, x = network(), batch()[0]
    errors = []
    for bits in (4, 6, 8):
        config = {
            "compression": {
                "algorithm": "quantization",
                "overflow_fix": "disable",
                "weights": {"bits": bits},
                "activations": {"bits": bits},
                "initializer": {
                    "range": {"type": "min_max"},
                    "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
                },
            }
        }
        received = compress(model, config, x).predict(x, verbose=0)
        errors.append(np.abs(received - model.predict(x, verbose=0)).mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize(
    "kind", ["arrays", "labelled", "dict", "generator", "dataset", "pydataset"]
)
def test_calibration_data_of_every_kind_gives_the_same_ranges(kind):
    x, y = batch()
    parts = [(x[:16], y[:16]), (x[16:], y[16:])]

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return parts[index]

    def dataset():
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, y)).batch(16)

    data = {
        "arrays": lambda: x,
        "labelled": lambda: (x, y),
        "dict": lambda: {"image": x},
        "generator": lambda: iter(parts),
        "dataset": dataset,
        "pydataset": Sequence,
    }[kind]()
    model = network()
    initializer = CONFIG["compression"]["initializer"] | {"range": {"type": "min_max"}}
    compressed = compress(model, with_options(initializer=initializer), data)
    found = compressed.get_layer("image-fake_quantize").quantizer
    assert found.calibrated and found.signed
    np.testing.assert_allclose(numpy(found.scale), np.abs(x).max(), rtol=1e-6)


def test_without_data_the_first_batches_set_the_ranges():
    compressed = compress(data=None)
    assert "first training batches" in compressed.plan["notes"][0]
    compiled(compressed)
    with pytest.raises(ValueError, match=r"keras_compress\.callbacks\.Compress"):
        compressed.fit(*batch(), verbose=0)
    with pytest.raises(ValueError, match=r"keras_compress\.callbacks\.Compress"):
        kc.strip(compressed)
    compressed.fit(*batch(), batch_size=8, epochs=3, verbose=0, callbacks=[kc.callbacks.Compress()])
    assert all(quantizer.calibrated for quantizer in compressed.quantizers())
    assert not compressed.run_eagerly
    assert {q.signed for q in compressed.quantizers()} == {True, False}


def test_statistics_reach_the_history():
    compressed = compiled(compress())
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    history = compressed.fit(*batch(), epochs=2, verbose=0, callbacks=callbacks).history
    assert history["compression/mean_bits"] == [8.0, 8.0]
    assert history["compression/quantizers"] == [len(compressed.quantizers())] * 2


def test_compress_refuses_other_models():
    with pytest.raises(ValueError, match="compress_model.*Received: model 'network'"):
        compiled(network()).fit(*batch(), verbose=0, callbacks=[kc.callbacks.Compress()])


def test_export_ir_callback_needs_its_quantity(tmp_path):
    with pytest.raises(ValueError, match="Received: mode='best'"):
        kc.callbacks.ExportIR(tmp_path / "m.xml", mode="best")
    with pytest.raises(ValueError, match="monitors 'val_accuracy', which is not logged"):
        callback = kc.callbacks.ExportIR(tmp_path / "m.xml", monitor="val_accuracy")
        compiled(compress()).fit(*batch(), verbose=0, callbacks=[callback])


def test_stripped_model_is_plain_and_bitwise_equal():
    compressed = compiled(compress())
    compressed.fit(*batch(), verbose=0)
    stripped = kc.strip(compressed)
    assert not any(isinstance(layer, CompressedLayer) for layer in stripped.layers)
    for layer in stripped.layers:
        assert isinstance(layer, FakeQuantize) or type(layer).__module__.startswith("keras.")
    x = batch(seed=1)[0]
    np.testing.assert_array_equal(stripped.predict(x, verbose=0), compressed.predict(x, verbose=0))


def test_strip_of_a_model_made_by_hand():
    model = keras.Sequential([keras.Input((6,)), FakeQuantDense(4, name="dense")])
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    stripped = kc.strip(model)
    assert type(stripped.get_layer("dense")) is keras.layers.Dense
    np.testing.assert_array_equal(numpy(stripped(x)), numpy(model(x)))


RESUME = """
import sys, numpy as np, keras
import keras_compress
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
outputs = model.predict(data["x"], verbose=0)
history = model.fit(data["x"], data["y"], epochs=2, shuffle=False, verbose=0, batch_size=8)
np.savez(sys.argv[3], outputs=outputs, losses=history.history["loss"])
"""


def test_saved_in_the_middle_and_resumed_in_a_new_process(tmp_path):
    x, y = batch()
    model = compiled(compress(), keras.optimizers.AdamW(1e-3))
    model.fit(x, y, shuffle=False, verbose=0, batch_size=8)
    model.save(tmp_path / "middle.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    names = [str(tmp_path / name) for name in ("middle.keras", "data.npz", "result.npz")]
    subprocess.run([sys.executable, "-c", RESUME, *names], check=True, capture_output=True)
    resumed = np.load(tmp_path / "result.npz")
    np.testing.assert_array_equal(resumed["outputs"], model.predict(x, verbose=0))
    history = model.fit(x, y, epochs=2, shuffle=False, verbose=0, batch_size=8)
    np.testing.assert_array_equal(resumed["losses"], history.history["loss"])


def test_weight_decay_leaves_ranges_alone():
    decayed = compiled(compress(), keras.optimizers.SGD(1e-6, weight_decay=1e5))
    ranges = [numpy(v).copy() for q in decayed.quantizers() for v in q.range_variables]
    kernel = numpy(decayed.get_layer("first").raw_weight("kernel")).copy()
    decayed.fit(*batch(), verbose=0)
    assert np.abs(numpy(decayed.get_layer("first").raw_weight("kernel")) / kernel - 1).max() > 0.05
    after = [v for q in decayed.quantizers() for v in q.range_variables]
    for old, variable in zip(ranges, after, strict=True):
        np.testing.assert_allclose(numpy(variable), old, rtol=1e-4)


def with_options(**options):
    return {"compression": CONFIG["compression"] | options}


def test_learn_ranges_off_keeps_them():
    model = compiled(compress(config=with_options(learn_ranges=False)))
    before = [numpy(v).copy() for q in model.quantizers() for v in q.range_variables]
    model.fit(*batch(), verbose=0)
    after = [numpy(v) for q in model.quantizers() for v in q.range_variables]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_learning_rate_multiplier_scales_the_steps_of_ranges():
    moved = {}
    for factor in (1.0, 3.0):
        keras.utils.set_random_seed(0)
        config = {"compression_lr_multiplier": factor, **CONFIG}
        model = compiled(compress(config=config), keras.optimizers.SGD(1e-2))
        scale = model.get_layer("relu-fake_quantize").quantizer.scale
        before = float(numpy(scale))
        model.train_on_batch(*batch())
        moved[factor] = float(numpy(scale)) - before
    assert moved[1.0] != 0
    assert moved[3.0] == pytest.approx(3 * moved[1.0], rel=1e-2)


def test_frozen_layers_stay_frozen():
    model = network()
    model.get_layer("first").trainable = False
    compressed = compress(model)
    assert compressed.get_layer("first").trainable_variables == []
    assert compressed.get_layer("head").trainable_variables != []


@pytest.mark.parametrize(
    "options",
    [pytest.param({"steps_per_execution": 4}, marks=one_step_per_execution), {"run_eagerly": True}],
)
def test_compile_options(options):
    model = compress(data=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **options)
    callbacks = [kc.callbacks.Compress()]
    losses = model.fit(*batch(64), batch_size=8, epochs=8, verbose=0, callbacks=callbacks).history
    assert losses["loss"][-1] < losses["loss"][0]
    assert all(quantizer.calibrated for quantizer in model.quantizers())


def test_compressing_again_and_keras_quantize_are_refused():
    compressed = compress()
    with pytest.raises(ValueError, match="not compressed yet. Received: model 'network'"):
        compress(compressed)
    with pytest.raises(ValueError, match="already compressed"):
        compressed.quantize("int8")
    with pytest.raises(ValueError, match=r"not compressed yet.*strip\(model, like=original\)"):
        compress(kc.strip(compressed))
    again = compress(kc.strip(compressed, like=network()))
    assert again.plan["weights"] == compressed.plan["weights"]


def test_bad_models():
    with pytest.raises(TypeError, match="Expected a Keras 3 model.*Received: model='float.keras'"):
        compress("float.keras")
    with pytest.raises(ValueError, match="Expected a built model"):
        compress(keras.Sequential([keras.layers.Dense(2)]))


def test_bad_configurations(tmp_path):
    with pytest.raises(kc.ConfigError, match="at least one algorithm.*Received: none"):
        compress(config={})
    for bits in (1, 9):
        with pytest.raises(kc.ConfigError, match="weights.bits.*from 2 to 8"):
            compress(config=with_options(weights={"bits": bits}))
    path = tmp_path / "config.json"
    path.write_text('{"compression": {"algorithm": "quantization",, }}')
    with pytest.raises(kc.ConfigError, match=r"config.json.*line 1"):
        compress(config=path)
    path.write_text(json.dumps(CONFIG) + " // comments are allowed")
    assert isinstance(compress(config=path), kc.CompressedModel)


def test_bad_data():
    x = batch()[0]
    with pytest.raises(ValueError, match=r"batch 0 does not fit.*'image'.*\(None, 8, 8, 3\)"):
        compress(data=x[:, :4])
    with pytest.raises(ValueError, match="batch 0 holds NaN or infinite values"):
        compress(data=np.where(x > 2, np.nan, x))
    with pytest.raises(ValueError, match="at least one sample"):
        compress(data=[])
    with pytest.raises(ValueError, match="at least one sample"):
        compress(data=x[:0])
    with pytest.raises(ValueError, match=r"Expected calibration data as.*Received: data=7"):
        compress(data=7)
    with pytest.raises(ValueError, match=r"keys \['picture'\]; missing \['image'\]"):
        compress(data={"picture": x})
    with pytest.raises(ValueError, match=r"1 input\(s\).*Received: 2 array\(s\)"):
        compress(data=[x, x])


def test_batch_norm_adapts_to_the_average_of_the_batches():
    from keras_compress.training.batch_norm import adapt_to_batches

    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.9)(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(x))
    model.layers[-1].gamma.assign(np.full(4, 2.0))
    batches = np.random.default_rng(0).normal(3, 2, (5, 16, 4)).astype("float32")
    adapt_to_batches(model, [[b] for b in batches])
    norm = model.get_layer("norm")
    np.testing.assert_allclose(numpy(norm.moving_mean), batches.mean(1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(numpy(norm.moving_variance), batches.var(1).mean(0), rtol=1e-4)
    np.testing.assert_array_equal(numpy(norm.gamma), np.full(4, 2.0))
    assert norm.momentum == 0.99


def test_hand_made_layers_accept_other_transforms():
    layer = FakeQuantConv2D(
        2, 3, transforms={"kernel": [kc.quantizers.AsymmetricQuantizer(bits=2)]}
    )
    layer(np.zeros((1, 4, 4, 1), "float32"))
    assert len(np.unique(layer.effective_weight("kernel"))) <= 4


def test_a_deep_model_compresses_saves_and_loads(tmp_path):
    inputs = keras.Input((4,))
    x = inputs
    for _ in range(260):  # with quantizers between, deeper than Python's stack
        x = keras.layers.Dense(4, activation="gelu")(x)
    model = keras.Model(inputs, x)
    data = np.random.default_rng(0).normal(size=(4, 4)).astype("float32")
    limit = sys.getrecursionlimit()
    compressed = kc.compress_model(model, CONFIG, data=data, verbose=False)
    compressed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(data)), numpy(compressed(data)))
    kc.export(compressed, tmp_path / "saved", verify=False)
    assert sys.getrecursionlimit() == limit
