"""The figures of `Statistics`: in `History`, in a CSV file, and in TensorBoard's own reader."""

import csv
import math

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc

EPOCH = 4  # steps
BATCH_NORM = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.5, "pruning_steps": 2, "round_to": 1},
}
QUANTIZATION = {"algorithm": "quantization", **BATCH_NORM}
FOUR_BITS = {"weights": {"bits": 4, "target_scopes": ["first"]}}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.75, "sparsity_target_epoch": 2, "power": 1},
}
RB = {"algorithm": "rb_sparsity", "params": {"schedule": "multistep", "multistep_steps": [1]}}
MOVEMENT = {
    "algorithm": "movement_sparsity",
    "params": {
        "warmup_start_epoch": 0,
        "warmup_end_epoch": 2,
        "importance_regularization_factor": 0.1,
        "enable_structured_masking": False,
    },
}
WEIGHTS = {"first": 8 * 16, "second": 16 * 12, "head": 12 * 4}


def network():
    inputs = keras.Input((8,), name="features")
    x = layers.Dense(16, activation="relu", name="first")(inputs)
    x = layers.Dense(12, activation="relu", name="second")(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def data(samples=8 * EPOCH):
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    return x, x[:, :4].argmax(-1).astype("int32")


def compressed(*algorithms, calibrated=True):
    keras.utils.set_random_seed(0)
    samples = data()[0] if calibrated else None
    config = {"compression": list(algorithms)}
    model = kc.compress_model(network(), config, data=samples, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # On TensorFlow a few steps are sooner done than compiled.
    eager = BACKEND == "tensorflow"
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, run_eagerly=eager)
    return model


def fitted(model, epochs, statistics=None, callbacks=(), shrink=False, **arguments):
    statistics = kc.callbacks.Statistics() if statistics is None else statistics
    callbacks = [kc.callbacks.Compress(shrink=shrink), statistics, *callbacks]
    x, y = data()
    fit = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0} | arguments
    history = model.fit(x, y, callbacks=callbacks, **fit).history
    prefix = "compression/"
    return {k.removeprefix(prefix): v for k, v in history.items() if k.startswith(prefix)}


def quantizers(model):
    """Return {name: quantizer}, the weights' and the edges'."""
    found = {}
    for layer in model.layers:
        for transform in layer.transforms_of("kernel") if hasattr(layer, "weight_names") else ():
            if hasattr(transform, "bits"):
                found[f"{layer.name}/kernel"] = transform
        if hasattr(layer, "quantizer"):
            found[layer.name] = layer.quantizer
    return found


EDGES = ["features-fake_quantize", "first-fake_quantize", "second-fake_quantize"]


def test_the_figures_of_quantization():
    model = compressed(QUANTIZATION | FOUR_BITS)
    figures = fitted(model, 2)
    # Four bits in one layer; the scope leaves the weights of the others in float.
    bits = (4 * WEIGHTS["first"] + 32 * (WEIGHTS["second"] + WEIGHTS["head"])) / sum(
        WEIGHTS.values()
    )
    assert figures["mean_weight_bits"] == pytest.approx([bits, bits], rel=1e-12)
    assert figures.keys() == {"quantizers", "mean_bits", "mean_weight_bits"}


def test_the_range_of_every_quantizer():
    model = compressed(QUANTIZATION)
    statistics = kc.callbacks.Statistics(per_layer=True)
    figures = fitted(model, 1, statistics)
    found = quantizers(model)
    assert found.keys() == {f"{name}/kernel" for name in WEIGHTS} | set(EDGES)
    assert {name for name in figures if name.startswith("range/")} == {f"range/{n}" for n in found}
    for name, quantizer in found.items():
        scale = np.abs(numpy(quantizer.scale)).ravel()
        # levels from -level_high or 0 to level_high, in steps of scale / level_high
        length = scale * (quantizer.level_high - quantizer.level_low) / quantizer.level_high
        assert figures[f"range/{name}"] == pytest.approx([length.mean()], rel=1e-4)


def test_ranges_that_are_not_known_yet_are_not_a_number():
    ranges = {"initializer": {"range": {"num_init_samples": 40}}}
    model = compressed(QUANTIZATION | ranges, calibrated=False)
    figures = fitted(model, 2, kc.callbacks.Statistics(per_layer=True))
    for edge in EDGES:
        before, after = figures[f"range/{edge}"]
        assert math.isnan(before) and after > 0
    assert all(value > 0 for value in figures["range/first/kernel"])


def test_the_figures_of_pruning():
    model = compressed(PRUNING)
    figures = fitted(model, 3, kc.callbacks.Statistics(per_layer=True))
    assert figures["level/filter_pruning"] == [0.0, 0.5, 0.5]
    for group in ("first", "second"):
        assert figures[f"pruning_level/{group}"] == [0.0, 0.5, 0.5]
        mask = model.get_layer(group).transforms_of("kernel")[0].mask(-1)
        assert mask.mean() == 0.5
    assert {name for name in figures if name.startswith("pruning_level/")} == {
        "pruning_level/first",
        "pruning_level/second",
    }
    assert "mean_weight_bits" not in figures
    assert not any(name.startswith("pruning_level/") for name in fitted(model, 4))


def test_the_figures_of_magnitude_sparsity():
    figures = fitted(compressed(MAGNITUDE), 3)
    assert figures["level/magnitude_sparsity"] == pytest.approx([0.0, 0.375, 0.75])
    assert figures["sparsity"] == pytest.approx([0.0, 0.375, 0.75], abs=1 / 368)
    each = np.array([figures[f"sparsity/{name}"] for name in WEIGHTS])
    shares = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    np.testing.assert_allclose(shares @ each, figures["sparsity"], rtol=1e-12)


def test_the_loss_of_rb_sparsity():
    model = compressed(RB)
    figures = fitted(model, 2)
    assert figures["level/rb_sparsity"] == [0.1, 0.5]
    # Nothing is off yet: ((1 - (1 - level)) / 0.05)^2
    assert figures["loss/rb_sparsity"] == pytest.approx([4.0, 100.0], rel=1e-4)


def test_the_loss_of_movement_sparsity():
    model = compressed(MOVEMENT)
    figures = fitted(model, 1)
    scores = [layer.transforms_of("kernel")[0].importance for layer in model.layers[1:]]
    means = [np.mean(1 / (1 + np.exp(-numpy(score).astype("float64")))) for score in scores]
    course = 1 - (1 - 0.5) ** 3  # half of the warm-up is done after its first epoch
    expected = 0.1 * course / 2 * np.mean(means)
    assert figures["loss/movement_sparsity"] == pytest.approx([expected], rel=1e-5)


def test_the_loss_of_ranges():
    model = compressed(QUANTIZATION | {"range_decay": 0.5})
    figures = fitted(model, 1)
    scales = [float(numpy(quantizers(model)[name].scale)) for name in EDGES[1:]]
    assert figures["loss/quantization"] == pytest.approx([0.25 * np.square(scales).sum()], rel=1e-5)


def test_a_layer_that_was_left_alone_counts_in_float():
    model = compressed(QUANTIZATION | {"ignored_scopes": ["second"]})
    bits = (8 * (WEIGHTS["first"] + WEIGHTS["head"]) + 32 * WEIGHTS["second"]) / 368
    assert fitted(model, 1)["mean_weight_bits"] == pytest.approx([bits], rel=1e-12)


def test_weights_that_wait_for_their_epoch_count_in_float():
    params = {"params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 0}}
    assert fitted(compressed(QUANTIZATION | params), 2)["mean_weight_bits"] == [32.0, 8.0]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(model, path, epochs, append=False, **arguments):
    statistics = kc.callbacks.Statistics(per_layer=True)
    csv_file = keras.callbacks.CSVLogger(path, append=append)
    x, y = data()
    return fitted(
        model, epochs, statistics, [csv_file], validation_data=(x[:8], y[:8]), **arguments
    )


def test_a_csv_file_is_complete_when_training_resumes_and_shrinks(tmp_path):
    """The same columns in every row, and the values of `History`."""
    path = tmp_path / "log.csv"
    model = compressed(PRUNING, QUANTIZATION)
    history = logged(model, path, 1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    width = again.count_params()
    later = logged(again, path, 4, append=True, initial_epoch=1, shrink=True)
    assert again.count_params() < width
    assert history.keys() == later.keys()
    found = rows(path)
    assert [int(row["epoch"]) for row in found] == [0, 1, 2, 3]
    columns = {"epoch", "loss", "val_loss"} | {f"compression/{name}" for name in history}
    for epoch, row in enumerate(found):
        assert row.keys() == columns
        for name in history:
            expected = (history[name] + later[name])[epoch]
            assert float(row[f"compression/{name}"]) == expected
    assert [float(row["compression/pruning_level/first"]) for row in found] == [0, 0.5, 0.5, 0.5]
    assert [float(row["compression/filters_left"]) for row in found] == [32, 18, 18, 18]


def histograms(folder):
    """Return {tag: {step: buckets (left, right, count)}} by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    log = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: {event.step: make_ndarray(event.tensor_proto) for event in log.Tensors(tag)}
        for tag in log.Tags()["tensors"]
    }


def assert_is_histogram_of(buckets, values):
    values = np.ravel(values).astype("float64")
    left, right, count = buckets.T
    assert count.sum() == len(values)
    assert left[0] == pytest.approx(values.min(), rel=1e-6, abs=1e-7)
    assert right[-1] == pytest.approx(values.max(), rel=1e-6, abs=1e-7)
    # A bucket is wide; where all of them are, is known to that.
    middle = (left + right) / 2
    width = (right - left).max()
    assert abs((middle * count).sum() / count.sum() - values.mean()) <= width / 2 + 1e-6


def test_histograms_are_read_back(tmp_path):
    model = compressed(PRUNING, MAGNITUDE, QUANTIZATION)
    statistics = kc.callbacks.Statistics(log_dir=tmp_path, histogram_freq=2)
    fitted(model, 3, statistics)
    found = histograms(tmp_path / "compression")
    kernels = [f"{name}/kernel" for name in WEIGHTS]
    biases = ["first/bias", "second/bias"]  # of the channels that may go
    expected = {f"range/{name}" for name in [*kernels, *EDGES]} | {
        f"{what}/{name}"
        for what in ("raw_weight", "effective_weight", "mask_density")
        for name in [*kernels, *biases]
    }
    assert set(found) == expected
    assert all(sorted(steps) == [0, 2] for steps in found.values())
    for name in kernels + biases:
        layer, weight = name.split("/")
        layer = model.get_layer(layer)
        raw, effective = numpy(layer.raw_weight(weight)), layer.effective_weight(weight)
        assert_is_histogram_of(found[f"raw_weight/{name}"][2], raw)
        assert_is_histogram_of(found[f"effective_weight/{name}"][2], effective)
        channels, *singles = [t for t in layer.transforms_of(weight) if not hasattr(t, "bits")]
        on = np.ones(raw.shape)
        for axis in channels.axes:
            shape = [1] * raw.ndim
            shape[axis] = -1
            on = on * channels.mask(axis).reshape(shape)
        for mask in singles:
            on = on * mask.mask_values()
        density = on if weight == "bias" else on.mean(axis=0)
        assert 0 < density.mean() < 1
        assert_is_histogram_of(found[f"mask_density/{name}"][2], density)
    for name, quantizer in quantizers(model).items():
        low, high = quantizer.effective_range()
        assert_is_histogram_of(found[f"range/{name}"][2], high - low)


def test_ranges_that_are_not_known_have_no_histogram(tmp_path):
    ranges = {"initializer": {"range": {"num_init_samples": 40}}}
    model = compressed(QUANTIZATION | ranges, calibrated=False)
    fitted(model, 2, kc.callbacks.Statistics(tmp_path, 1))
    found = histograms(tmp_path / "compression")
    assert list(found["range/first-fake_quantize"]) == [1]
    assert list(found["range/first/kernel"]) == [0, 1]
    assert not any(tag.startswith("mask_density/") for tag in found)


def test_a_second_training_writes_on(tmp_path):
    model = compressed(MAGNITUDE)
    statistics = kc.callbacks.Statistics(tmp_path, 1)
    fitted(model, 1, statistics)
    fitted(model, 2, statistics, initial_epoch=1)
    found = histograms(tmp_path / "compression")
    assert list(found["effective_weight/head/kernel"]) == [0, 1]


def test_scalars_are_in_the_log_of_keras(tmp_path):
    model = compressed(PRUNING, QUANTIZATION)
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    statistics = kc.callbacks.Statistics(tmp_path, 1, per_layer=True)
    figures = fitted(model, 2, statistics, [board])
    scalars = histograms(tmp_path / "train")
    tags = {f"epoch_compression/{name}" for name in figures}
    assert {tag for tag in scalars if tag.startswith("epoch_compression/")} == tags
    for name, values in figures.items():
        read = [float(scalars[f"epoch_compression/{name}"][epoch]) for epoch in range(2)]
        assert read == pytest.approx(values, rel=1e-6)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train", "compression"}


@pytest.mark.parametrize("frequency", [-1, 1.5, None, True])
def test_a_frequency_is_a_whole_number(frequency):
    with pytest.raises(ValueError, match=f"whole number.*Received: histogram_freq={frequency}"):
        kc.callbacks.Statistics("logs", frequency)


@pytest.mark.parametrize("arguments", [{"log_dir": "logs"}, {"histogram_freq": 2}])
def test_histograms_need_a_folder_and_a_frequency(arguments):
    with pytest.raises(ValueError, match="Expected both.*Received: log_dir=.*histogram_freq="):
        kc.callbacks.Statistics(**arguments)


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted(compressed(QUANTIZATION), 1)
    assert not list(tmp_path.iterdir())
