"""Magnitude and constant sparsity as a user meets them."""

import zipfile

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from export_helpers import randomized
from keras import layers

import keras_compress as kc
from keras_compress.masks import ChannelMask
from keras_compress.weight_masks import WeightMask

LOSS = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}


def network(factor=1.0):
    """A fifth of all weights are in `pointwise`, whose values have a factor of their own."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, padding="same", name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 1, name="pointwise")(x))
    model = randomized(keras.Model(inputs, layers.Dense(4, name="head")(x), name="network"))
    kernel = model.get_layer("pointwise").kernel
    kernel.assign(numpy(kernel) * factor)
    return model


def data(samples=32):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 8, 8, 4)).astype("float32")
    return x, (np.arange(samples) % 4).astype("int32")


def magnitude(init=0.0, **params):
    return {"algorithm": "magnitude_sparsity", "sparsity_init": init, "params": params}


def compressed(*algorithms, model=None, **arguments):
    model = network() if model is None else model
    return kc.compress_model(model, {"compression": list(algorithms)}, verbose=False, **arguments)


def fitted(model, epochs, callbacks=(), **arguments):
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), **LOSS, **arguments)
    x, y = data()
    callbacks = [kc.callbacks.Compress(), *callbacks]
    return model.fit(
        x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )


def masks(model):
    """Return {layer: mask} of the kernels of a compressed model."""
    return {
        layer.name: transform.mask_values()
        for layer in model.layers
        for transform in (
            layer.transforms_of("kernel")
            if hasattr(layer, "weight_names") and "kernel" in layer.weight_names
            else ()
        )
        if isinstance(transform, WeightMask)
    }


def zeros(masks_):
    values = np.concatenate([mask.ravel() for mask in masks_])
    return int((~values).sum()), values.size


def at_once(target, **params):
    return magnitude(target, sparsity_target=target, **params)


@pytest.mark.parametrize("level", [0.1, 0.333, 0.5, 0.8, 0.99])
def test_the_global_level_is_exact_within_one_weight(level):
    off, total = zeros(masks(compressed(at_once(level))).values())
    assert total == 9 * 4 * 8 + 9 * 8 + 8 * 16 + 16 * 4
    assert 0 <= level * total - off < 1


@pytest.mark.parametrize("level", [0.333, 0.8])
def test_the_local_level_is_exact_in_every_layer(level):
    found = masks(compressed(at_once(level, sparsity_level_setting_mode="local")))
    for mask in found.values():
        off, total = zeros([mask])
        assert 0 <= level * total - off < 1


def test_abs_takes_the_small_layer_first_and_normed_abs_does_not():
    absolute, normed = (
        masks(compressed(at_once(0.2, weight_importance=kind), model=network(0.01)))
        for kind in ("abs", "normed_abs")
    )
    assert absolute["pointwise"].mean() < 0.3 and normed["pointwise"].mean() > 0.6


def test_the_smallest_go():
    model = network()
    found = masks(compressed(at_once(0.5, weight_importance="abs"), model=model))
    kernels = {name: np.abs(numpy(model.get_layer(name).kernel)) for name in found}
    largest_off = max(kernels[name][~mask].max(initial=0) for name, mask in found.items())
    smallest_on = min(kernels[name][mask].min(initial=9) for name, mask in found.items())
    assert largest_off < smallest_on


def test_masks_depend_on_nothing_but_the_weights():
    """The same numbers on every backend: 0.4 of 1, 2, ..., 10 are the four smallest."""
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layers.Dense(2, name="dense", use_bias=False)(inputs))
    model.get_layer("dense").set_weights([np.arange(10, 0, -1, "float32").reshape(5, 2)])
    mask = masks(compressed(at_once(0.4), model=model))["dense"]
    assert mask.tolist() == [[True, True]] * 3 + [[False, False]] * 2


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # concave: T - T (1 - e/4)^2
        (
            {"schedule": "polynomial", "power": 2, "sparsity_target_epoch": 4},
            [0.0, 0.35, 0.6, 0.75, 0.8, 0.8],
        ),
        # convex: T (e/4)^2
        (
            {"schedule": "polynomial", "power": 2, "concave": False, "sparsity_target_epoch": 4},
            [0.0, 0.05, 0.2, 0.45, 0.8, 0.8],
        ),
        # 1 - 0.2^(e/2)
        (
            {"schedule": "exponential", "sparsity_target_epoch": 2},
            [0.0, 1 - 0.2**0.5, 0.8, 0.8, 0.8, 0.8],
        ),
        (
            {
                "schedule": "multistep",
                "multistep_steps": [1, 3],
                "multistep_sparsity_levels": [0.1, 0.4, 0.8],
            },
            [0.1, 0.4, 0.4, 0.8, 0.8, 0.8],
        ),
        ({"schedule": "adaptive", "patience": 2}, [0.0, 0.0, 0.05, 0.05, 0.1, 0.1]),
        (
            {"schedule": "polynomial", "power": 1, "sparsity_target_epoch": 4}
            | {"sparsity_freeze_epoch": 2},
            [0.0, 0.2, 0.2, 0.2, 0.2, 0.2],
        ),
    ],
)
def test_the_level_of_every_epoch(params, expected):
    model = compressed(magnitude(sparsity_target=0.8, **params))
    history = fitted(model, 6, [kc.callbacks.Statistics()]).history
    total = zeros(masks(model).values())[1]
    assert np.allclose(history["compression/sparsity"], expected, atol=1 / total)
    layers_ = [history[f"compression/sparsity/{name}"][-1] for name in masks(model)]
    assert min(layers_) >= 0 and max(layers_) <= 1 and len(layers_) == 4


class Record(keras.callbacks.Callback):
    """Notes (step, zeros) after every batch; on JAX `self.model` alone is up to date in `fit`."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        step = int(numpy(model.optimizer.iterations))
        self.levels.append((step, zeros(masks(model).values())[0]))


@pytest.mark.parametrize("steps_per_execution", [1, 4])
@pytest.mark.parametrize("steps_per_epoch", [None, 8])
def test_per_step_levels(steps_per_execution, steps_per_epoch):
    """Linear from 0 to 0.8 over two epochs of 8 steps: a twentieth per step."""
    if BACKEND == "torch" and steps_per_execution > 1:
        pytest.skip("Keras on torch runs one step per execution")
    options = {"sparsity_target": 0.8, "power": 1, "sparsity_target_epoch": 2}
    options |= {"update_per_optimizer_step": True}
    if steps_per_epoch:
        options["steps_per_epoch"] = steps_per_epoch
    model = compressed(magnitude(**options))
    model.compile("sgd", steps_per_execution=steps_per_execution, **LOSS)
    seen = []
    fitted(model, 3, [Record(seen)])
    total = zeros(masks(model).values())[1]
    assert len(seen) == 24 // steps_per_execution
    for step, off in seen:
        assert 0 <= min(0.05 * step, 0.8) * total - off < 1 + 1e-6


def test_epochs_are_counted_by_steps_where_training_resumes_in_the_midst_of_one():
    """Three steps are done of the eight in an epoch: the next one begins behind five batches."""
    model = compressed(magnitude(sparsity_target=0.8, power=1, sparsity_target_epoch=2))
    model.compile("sgd", **LOSS)
    x, y = data()
    for _ in range(3):
        model.train_on_batch(x[:4], y[:4])
    seen = []
    fitted(model, 2, [Record(seen)])
    total = zeros(masks(model).values())[1]
    expected = [0.0] * 5 + [0.4] * 8 + [0.8] * 3
    assert [step for step, _ in seen] == list(range(4, 20))
    for level, (_, off) in zip(expected, seen, strict=True):
        assert 0 <= level * total - off < 1


def test_resumed_in_the_midst_the_masks_are_the_same(tmp_path):
    original = network()
    algorithm = magnitude(sparsity_target=0.9, sparsity_target_epoch=4)
    whole = compressed(algorithm, model=original)
    fitted(whole, 5)
    first = compressed(algorithm, model=original)
    fitted(first, 2)
    first.save(tmp_path / "half.keras")
    second = keras.models.load_model(tmp_path / "half.keras")
    fitted(second, 3)
    expected, received = masks(whole), masks(second)
    assert all(np.array_equal(expected[name], received[name]) for name in expected)
    assert second.progress["magnitude_sparsity"]["level"] == 0.9


def test_stripped_layers_are_plain_and_hold_the_masked_weights():
    model = compressed(at_once(0.7))
    plain = kc.strip(model)
    assert type(plain.get_layer("conv")) is layers.Conv2D
    raw = numpy(model.get_layer("conv").raw_weight("kernel"))
    assert np.array_equal(numpy(plain.get_layer("conv").kernel), raw * masks(model)["conv"])
    x = data()[0]
    assert np.array_equal(numpy(plain(x)), numpy(model(x, training=False)))


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:5", 3, 5)])
def test_n_of_m_along_the_input_axis(pattern, n, m):
    model = compressed(magnitude(1 - n / m, sparsity_pattern=pattern))
    kernels = kc.strip(model)
    for name in ("conv", "pointwise", "head"):
        kernel = np.moveaxis(numpy(kernels.get_layer(name).kernel), -2, -1)
        for start in range(0, kernel.shape[-1], m):
            assert ((kernel[..., start : start + m] != 0).sum(-1) <= n).all()
    assert numpy(kernels.get_layer("depthwise").kernel).all()
    reasons = {entry["layer"]: entry["reason"] for entry in model.plan["untouched"]}
    assert "sums over no axis that" in reasons["depthwise"]


def test_n_of_m_comes_gradually():
    model = compressed(magnitude(sparsity_pattern="2:4", power=1, sparsity_target_epoch=2))
    history = fitted(model, 3, [kc.callbacks.Statistics()]).history
    assert np.allclose(history["compression/sparsity/pointwise"], [0, 0.25, 0.5])


def test_whole_blocks_go():
    params = {"sparsity_pattern": "block", "block_shape": [4, 2]}
    found = masks(compressed(at_once(0.5, sparsity_level_setting_mode="local", **params)))
    for mask in (found["conv"], found["pointwise"]):
        tiles = mask.reshape(*mask.shape[:-2], mask.shape[-2] // 4, 4, mask.shape[-1] // 2, 2)
        means = tiles.mean((-3, -1))
        assert set(np.unique(means)) == {0.0, 1.0} and means.mean() == 0.5


def test_zeros_stay_zeros_on_the_integer_grid(tmp_path):
    model = compressed(
        {"algorithm": "quantization"}, magnitude(0.5, sparsity_pattern="2:4"), data=data()[0]
    )
    fitted(model, 1)
    for name, mask in masks(model).items():
        effective = model.get_layer(name).effective_weight("kernel")
        assert not effective[~mask].any()
        assert effective.any()
    if BACKEND == "tensorflow":
        kc.export(model, tmp_path / "model.xml", data=data()[0])
        codes = _integer_constants(tmp_path / "model.xml")
        for name, axis in {"conv": 1, "pointwise": 1, "head": 0}.items():
            runs = np.moveaxis(codes[name], axis, -1).reshape(-1, 4)
            assert ((runs != 0).sum(-1) <= 2).all() and runs.any(), name


def _integer_constants(path):
    """Return {layer: codes} of the weights that the IR holds as 8-bit integers."""
    import openvino as ov

    return {
        op.get_friendly_name().partition("/")[0]: op.data.copy()
        for op in ov.Core().read_model(path).get_ops()
        if op.get_friendly_name().endswith("/kernel/codes")
    }


@pytest.mark.skipif(BACKEND != "tensorflow", reason="looks at the IR, the same on every backend")
def test_the_zipped_ir_shrinks_with_sparsity(tmp_path):
    sizes = []
    for name, level in (("dense", 0.0), ("half", 0.5), ("most", 0.9)):
        model = compressed(at_once(level), model=wide())
        report = kc.export(model, tmp_path / f"{name}.xml")
        assert report.stored_bytes == sum(
            (tmp_path / f"{name}.{suffix}").stat().st_size for suffix in ("xml", "bin")
        )
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for suffix in ("xml", "bin"):
                archive.write(tmp_path / f"{name}.{suffix}", suffix)
        files = zipfile.ZipFile(tmp_path / f"{name}.zip").infolist()
        assert report.zipped_bytes == pytest.approx(sum(f.compress_size for f in files), abs=99)
        text = " ".join(str(report).split())  # a long path breaks the line
        assert f"{report.zipped_bytes:,} zipped" in text
        sizes.append((report.stored_bytes, report.zipped_bytes))
    assert sizes[0][0] == pytest.approx(sizes[2][0], rel=0.01)
    assert sizes[1][1] < 0.65 * sizes[0][1] and sizes[2][1] < 0.25 * sizes[0][1]


def wide():
    inputs = keras.Input((256,))
    return keras.Model(inputs, layers.Dense(256, name="wide")(inputs))


def test_together_with_filter_pruning():
    pruning = {"algorithm": "filter_pruning"}
    pruning["params"] = {"schedule": "baseline", "round_to": 1, "prune_first_conv": True}
    model = compressed(at_once(0.5), pruning)
    kinds = [type(t) for t in model.get_layer("conv").transforms_of("kernel")]
    assert set(kinds) == {WeightMask, ChannelMask}
    x = data()[0]
    small = kc.strip(model)
    assert np.allclose(numpy(small(x)), numpy(model(x, training=False)), atol=1e-5)
    assert small.count_params() < network().count_params()
    again = kc.shrink(model)
    assert np.allclose(numpy(again(x)), numpy(model(x, training=False)), atol=1e-5)


def test_const_keeps_the_zeros_of_a_checkpoint():
    model = network()
    kernel = model.get_layer("conv").kernel
    was_zero = np.random.default_rng(0).random(kernel.shape) < 0.4
    kernel.assign(np.where(was_zero, 0, numpy(kernel)))
    sparse = compressed({"algorithm": "const_sparsity"}, model=model)
    fitted(sparse, 2)
    trained = numpy(kc.strip(sparse).get_layer("conv").kernel)
    assert not trained[was_zero].any() and trained[~was_zero].all()
    assert masks(sparse)["pointwise"].all()


def test_scopes_choose_layers():
    model = compressed(at_once(0.5) | {"ignored_scopes": ["head"]})
    assert "head" not in masks(model) and "conv" in masks(model)
    reasons = {entry["layer"]: entry["reason"] for entry in model.plan["untouched"]}
    assert reasons["head"] == "not sparse: excluded by the scopes of the configuration"
    with pytest.raises(kc.ConfigError, match="nothing"):
        compressed(at_once(0.5) | {"ignored_scopes": ["nothing"]})
    with pytest.raises(kc.ConfigError, match="Expected a model with weights.*excluded"):
        compressed(at_once(0.5) | {"ignored_scopes": ["{re}.*"]})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity_pattern": "4:2"}, "0 < N < M"),
        ({"sparsity_pattern": "rows"}, "'unstructured', 'block' or N:M"),
        ({"sparsity_pattern": "2:4", "sparsity_target": 0.7}, "or 0.5, which the pattern has"),
        ({"block_shape": [4]}, "two sizes"),
        ({"update_per_optimizer_step": True, "schedule": "multistep"}, "schedule='polynomial'"),
    ],
)
def test_bad_options(params, message):
    with pytest.raises(kc.ConfigError, match=message):
        kc.Config.load({"compression": magnitude(**params)})


def test_a_start_above_the_target_is_refused():
    with pytest.raises(kc.ConfigError, match="sparsity_init=0.6, target 0.5"):
        kc.Config.load({"compression": magnitude(0.6, sparsity_target=0.5)})
