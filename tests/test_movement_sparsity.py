"""Movement sparsity as a user meets it."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from export_helpers import randomized
from keras import layers

import keras_compress as kc
from keras_compress.algorithms.movement_structure import first_threshold
from keras_compress.options import ConfigError
from keras_compress.weight_masks import MovementMask

WARMUP = {
    "warmup_start_epoch": 1,
    "warmup_end_epoch": 3,
    "importance_regularization_factor": 0.1,
}


def network():
    inputs = keras.Input((8,))
    x = layers.Dense(16, activation="relu", name="first")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def transformer():
    """Four heads of two channels and twelve hidden units; the embedding's channels stay."""
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(4, 2, name="attention")(inputs, inputs)
    x = layers.LayerNormalization(name="norm")(layers.Add(name="sum")([inputs, x]))
    y = layers.Dense(12, activation="gelu", name="up")(x)
    y = layers.Dense(8, name="down")(y)
    y = layers.Dense(3, name="head")(layers.Add(name="sum_2")([x, y]))
    return randomized(keras.Model(inputs, y, name="transformer"))


def compressed(model=None, structures=(), **params):
    algorithm = {
        "algorithm": "movement_sparsity",
        "params": WARMUP | params,
        "sparse_structure_by_scopes": list(structures),
    }
    model = network() if model is None else model
    return kc.compress_model(model, {"compression": algorithm}, verbose=False)


def data(samples=32):
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    return x, x[:, :4].argmax(-1).astype("int32")


def fitted(model, epochs, callbacks=()):
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss)
    x, y = data()
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics(), *callbacks]
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks).history


def masks(model):
    """Return {layer: `MovementMask` of its kernel}."""
    return {entry.layer.name: entry.mask for entry in model.config.algorithms[0].masked(model)}


def set_scores(model, seed=0):
    random = np.random.default_rng(seed)
    for mask in masks(model).values():
        mask.importance.assign(random.normal(size=mask.importance.shape))


def added_loss(model):
    return float(numpy(model.config.algorithms[0].loss(model)))


def move(model, epoch):
    model.config.algorithms[0].begin_epoch(model, epoch)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


# The course


def test_threshold_and_factor_follow_the_warm_up():
    """p = 0, 1/4, 1/2, 3/4, 1 have 1 - (1 - p)^3 = 0, 37/64, 7/8, 63/64, 1."""
    model = compressed(init_importance_threshold=-1.0, final_importance_threshold=1.0)
    (algorithm,) = model.config.algorithms
    for epoch, done in [(1.0, 0), (1.5, 37 / 64), (2.0, 7 / 8), (2.5, 63 / 64), (3.0, 1)]:
        assert algorithm.update(model, 0, epoch)
        for mask in masks(model).values():
            assert float(numpy(mask.threshold)) == pytest.approx(-1 + 2 * done)
            assert float(numpy(mask.factor)) == pytest.approx(0.1 * done)
        figures = algorithm.statistics(model)
        assert figures["importance_threshold"] == pytest.approx(-1 + 2 * done)
        assert figures["importance_regularization_factor"] == pytest.approx(0.1 * done)


def test_power_and_steps_per_epoch():
    model = compressed(power=1.0, steps_per_epoch=10, init_importance_threshold=-1.0)
    (algorithm,) = model.config.algorithms
    assert algorithm.update(model, 15, None)  # epoch 1.5, a quarter of the warm-up
    assert float(numpy(masks(model)["head"].threshold)) == pytest.approx(-0.75)
    assert algorithm.update(model, 12, None)  # never back
    assert float(numpy(masks(model)["head"].threshold)) == pytest.approx(-0.75)


def test_nothing_is_masked_and_nothing_added_before_the_warm_up():
    model = compressed(init_importance_threshold=9.0)
    set_scores(model)
    move(model, 0)
    model.config.algorithms[0].update(model, 3, 0.9)
    assert all(mask.mask_values().all() for mask in masks(model).values())
    assert added_loss(model) == 0.0
    assert model.config.algorithms[0].statistics(model)["importance_threshold"] == -np.inf


@pytest.mark.parametrize("structures", [(), [{"mode": "per_dim", "axis": 0}]])
def test_the_first_threshold_leaves_almost_everything_on(structures):
    model = compressed(structures=structures)
    set_scores(model)
    move(model, 1)
    found = masks(model).values()
    off = sum(int((~mask.mask_values()).sum()) for mask in found)
    assert off <= 0.001 * sum(mask.mask_values().size for mask in found)
    scores = np.concatenate([numpy(mask.importance).ravel() for mask in found])
    threshold = float(numpy(masks(model)["head"].threshold))
    assert 0 < scores.min() - threshold < 1e-4  # of 192 weights not one is 0.1 %
    move(model, 2)
    expected = threshold * (1 - 7 / 8)
    assert float(numpy(masks(model)["head"].threshold)) == pytest.approx(expected)


def test_the_first_threshold_counts_weights():
    fine, slices = MovementMask(), MovementMask("per_dim", axis=-1)
    fine.build((30, 10))
    slices.build((20, 5))
    fine.importance.assign(np.arange(1, 301).reshape(30, 10))
    slices.importance.assign([[0.5, 400, 401, 402, 403]])
    assert first_threshold([fine, slices], 0.049) == pytest.approx(0.5, abs=1e-4)  # 19.6 of 400
    assert first_threshold([fine, slices], 0.05) == pytest.approx(1, abs=1e-4)


def test_untrained_importances_mask_nothing():
    model = compressed(warmup_start_epoch=0)
    assert all(mask.mask_values().all() for mask in masks(model).values())


# The loss


@pytest.mark.parametrize("structures", [(), [{"mode": "block", "sparse_factors": [2, 4]}]])
def test_the_loss_is_its_formula(structures):
    model = compressed(structures=structures)
    set_scores(model)
    move(model, 2)
    size = 8 if structures else 1
    penalties = [size * sigmoid(numpy(m.importance)).mean() for m in masks(model).values()]
    assert added_loss(model) == pytest.approx(0.1 * 7 / 8 / 2 * np.mean(penalties), rel=1e-5)
    move(model, 3)
    assert added_loss(model) == 0.0


def test_training_adds_the_loss():
    model = compressed(warmup_start_epoch=0, importance_regularization_factor=2.0)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    move(model, 1)
    x, _ = data(8)
    y = np.zeros((8, 4), "float32")
    trained = float(model.train_on_batch(x, y))
    evaluated = float(model.evaluate(x, y, verbose=0, batch_size=8))
    expected = 2.0 * (1 - (2 / 3) ** 3) / 2 * 0.5  # all importances are 0
    assert trained - evaluated == pytest.approx(expected, rel=1e-3)


def test_compiled_steps_see_the_course():
    """The penalty draws importances down once the warm-up has begun, and not before."""
    model = compressed(importance_regularization_factor=500.0)
    model.compile(keras.optimizers.SGD(1.0), keras.losses.MeanSquaredError())
    for layer in model.layers:  # no gradient but that of the penalty
        if layer.name == "head":
            layer.raw_weight("kernel").assign(np.zeros((16, 4)))
    x, y = np.zeros((16, 8), "float32"), np.zeros((16, 4), "float32")
    seen = []
    each = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(float(numpy(masks(model)["first"].importance).max()))
    )
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[kc.callbacks.Compress(), each])
    assert seen[0] == 0.0 and seen[1] < 0.0 and seen[2] < seen[1]


# After the warm-up


@pytest.mark.parametrize("structured", [False, True])
def test_masks_are_fixed_after_the_warm_up(structured):
    model = compressed(enable_structured_masking=structured, importance_regularization_factor=0.0)
    seen = []
    each = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append([m.mask_values() for m in masks(model).values()])
    )
    history = fitted(model, 5, [each])
    assert model.progress["movement_sparsity"]["frozen"]
    assert all(bool(numpy(mask.frozen)) for mask in masks(model).values())
    assert all(np.array_equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    assert history["compression/sparsity"][0] == 0.0
    assert structured or 0 < history["compression/sparsity"][4] < 1
    assert "compression/sparsity/first" in history
    assert added_loss(model) == 0.0


def test_fine_masks_are_fixed_as_they_are():
    model = compressed(enable_structured_masking=False)
    set_scores(model)
    move(model, 3)
    for mask in masks(model).values():
        assert np.array_equal(mask.mask_values(), numpy(mask.importance) > 0)
    plain = kc.strip(model)
    zeros = numpy(plain.get_layer("first").kernel) == 0
    assert np.array_equal(zeros, ~masks(model)["first"].mask_values())


def test_masks_are_fixed_where_training_ends_with_the_warm_up():
    model = compressed()
    fitted(model, 3)
    assert model.progress["movement_sparsity"]["frozen"]
    model = compressed()
    fitted(model, 2)
    assert not model.progress["movement_sparsity"]["frozen"]


# Structures


@pytest.mark.parametrize(
    ("structure", "layer", "block"),
    [
        ({"mode": "per_dim", "axis": 0}, "up", (8, 1)),
        ({"mode": "per_dim", "axis": 1}, "up", (1, 12)),
        ({"mode": "block", "sparse_factors": [4, 2]}, "up", (2, 4)),
        ({"mode": "per_dim", "axis": 0}, "attention-query", (8, 1, 1)),
        ({"mode": "per_dim", "axis": 1}, "attention-query", (1, 4, 2)),
        ({"mode": "block", "sparse_factors": [2, 4]}, "attention-query", (4, 1, 2)),
        ({"mode": "block", "sparse_factors": [4, 4]}, "attention-query", (4, 2, 2)),
        ({"mode": "per_dim", "axis": 0}, "attention-attention_output", (4, 2, 1)),
        ({"mode": "per_dim", "axis": 1}, "attention-attention_output", (1, 1, 8)),
        ({"mode": "block", "sparse_factors": [8, 4]}, "attention-attention_output", (2, 2, 8)),
    ],
)
def test_structures_of_matrices(structure, layer, block):
    """Sizes are those of PyTorch's matrix (outputs, inputs), heads and their channels in one."""
    model = compressed(transformer(), [structure | {"target_scopes": [layer]}])
    assert masks(model)[layer].block == block
    assert max(masks(model)["head"].block) == 1


@pytest.mark.parametrize(
    ("structure", "conv", "depthwise", "transposed"),
    [
        ({"mode": "per_dim", "axis": 0}, (3, 3, 4, 1), (3, 3, 1, 1), (3, 3, 1, 8)),
        ({"mode": "block", "sparse_factors": [2, 1]}, (1, 1, 1, 2), (1, 1, 2, 1), (1, 1, 2, 1)),
    ],
)
def test_structures_of_convolutions(structure, conv, depthwise, transposed):
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2DTranspose(2, 3, name="transposed")(x)
    model = compressed(keras.Model(inputs, x), [structure])
    found = masks(model)
    assert found["conv"].block == conv
    assert found["depthwise"].block == depthwise
    assert found["transposed"].block == transposed


def test_the_first_structure_that_matches_counts():
    structures = [
        {"mode": "per_dim", "axis": 0, "target_scopes": "{re}fir"},
        {"mode": "block", "sparse_factors": [2, 2]},
    ]
    found = masks(compressed(structures=structures))
    assert found["first"].block == (8, 1) and found["head"].block == (2, 2)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"target_scopes": ["first", "heda"]}, "heda.*Did you mean 'head'"),
        ({"mode": "block", "sparse_factors": [3, 2]}, "3 does not divide 16 outputs"),
        ({"mode": "block", "sparse_factors": [4, 3]}, "3 does not divide 8 inputs"),
        ({"mode": "block"}, "sparse_factors"),
        ({"mode": "block", "sparse_factors": [4]}, "outputs and inputs"),
        ({"mode": "per_dim"}, "axis"),
        ({"mode": "per_dim", "axis": 2}, "axis=2"),
        ({"axis": 0}, "per_dim"),
    ],
)
def test_wrong_structures_are_errors(structure, message):
    with pytest.raises(ConfigError, match=message):
        compressed(structures=[structure])


def test_a_layer_without_input_axis_has_no_slices_along_it():
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, layers.DepthwiseConv2D(3, name="depthwise")(inputs))
    with pytest.raises(ConfigError, match="'depthwise' \\(DepthwiseConv2D\\)"):
        compressed(model, [{"mode": "per_dim", "axis": 1}])


def test_a_warm_up_must_last():
    with pytest.raises(ConfigError, match="warmup_end_epoch=1"):
        compressed(warmup_end_epoch=1)


def test_filter_pruning_is_refused_beside_structured_masking():
    algorithms = [{"algorithm": "movement_sparsity", "params": WARMUP}]
    algorithms.append({"algorithm": "filter_pruning"})
    with pytest.raises(ConfigError, match="enable_structured_masking"):
        kc.compress_model(network(), {"compression": algorithms}, verbose=False)


# Whole channels


def switched(head_off=(1,), units_off=(0, 5, 7), **options):
    """Return a transformer with importances by hand; every other weight of the rest is off too."""
    model = compressed(transformer(), **options)
    found = masks(model)
    for mask in found.values():
        mask.importance.assign(np.indices(mask.importance.shape).sum(0) % 2 * 2.0 - 1)

    def switch(layer, index):
        scores = numpy(found[layer].importance).copy()
        scores[index] = -1
        found[layer].importance.assign(scores)

    for name in ("query", "key", "value"):
        switch(f"attention-{name}", (slice(None), list(head_off)))
    switch("attention-attention_output", (list(head_off),))
    switch("up", (slice(None), list(units_off)))
    switch("down", (list(units_off),))
    return model


def outputs(model):
    x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype("float32")
    return numpy(model(x, training=False))


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_heads_and_hidden_units_that_are_off_are_removed():
    model = switched()
    before = model.count_params()
    move(model, 3)
    found = {name: mask.mask_values() for name, mask in masks(model).items()}
    for name in ("query", "key", "value"):
        on = found[f"attention-{name}"].all((0, 2))
        assert on.tolist() == [True, False, True, True]
        assert not found[f"attention-{name}"][:, 1].any()
    units = [i not in (0, 5, 7) for i in range(12)]
    assert found["up"].all(0).tolist() == units and found["up"].any(0).tolist() == units
    assert found["down"].all(1).tolist() == units and found["down"].any(1).tolist() == units
    assert found["head"].mean() == 0.5  # as learnt
    expected = outputs(model)
    plain = kc.strip(model)
    assert plain.get_layer("attention-query").kernel.shape == (8, 3, 2)
    assert plain.get_layer("attention-attention_output").kernel.shape == (3, 2, 8)
    assert plain.get_layer("up").kernel.shape == (8, 9)
    assert plain.get_layer("down").kernel.shape == (9, 8)
    assert_same(outputs(plain), expected)
    small = kc.shrink(model)
    assert small.count_params() < before
    assert_same(outputs(small), expected)
    assert_same(outputs(kc.strip(small)), expected)


def test_removing_changes_nothing_but_the_weights_that_come_back():
    """With all other weights on, the fixed model is the masked one of before."""
    model = switched()
    for name, mask in masks(model).items():
        scores = np.ones(mask.importance.shape)
        heads, units = ([1], [0, 5, 7])
        index = {"up": np.s_[:, units], "down": units, "attention-attention_output": heads}
        if name != "head":
            scores[index.get(name, np.s_[:, heads])] = -1
        mask.importance.assign(scores)
        mask.threshold.assign(0.0)
    expected = outputs(model)
    move(model, 3)
    assert_same(outputs(model), expected)
    assert kc.strip(model).get_layer("up").kernel.shape == (8, 9)
    assert_same(outputs(kc.strip(model)), expected)


def test_a_channel_stays_that_one_weight_still_needs():
    model = switched(head_off=(1, 2), units_off=(0, 5, 7))
    for layer, index in (("attention-value", (3, 2, 1)), ("down", (5, 4))):
        scores = numpy(masks(model)[layer].importance).copy()
        scores[index] = 1.0
        masks(model)[layer].importance.assign(scores)
    move(model, 3)
    plain = kc.strip(model)
    assert plain.get_layer("attention-query").kernel.shape == (8, 3, 2)
    assert plain.get_layer("up").kernel.shape == (8, 10)
    assert_same(outputs(plain), outputs(model))


def test_the_best_channel_stays_where_all_are_off():
    model = compressed(transformer())
    for name in ("up", "down"):
        scores = np.full(masks(model)[name].importance.shape, -1.0)
        scores[(slice(None), 4) if name == "up" else 4] = -0.5
        masks(model)[name].importance.assign(scores)
    found = [masks(model)[name] for name in ("up", "down")]
    for mask in found:
        mask.percentile = 1.0  # else 2 % of the weights are on
    move(model, 3)
    plain = kc.strip(model)
    assert plain.get_layer("up").kernel.shape == (8, 1)
    assert np.array_equal(found[0].mask_values().any(0), np.arange(12) == 4)
    assert_same(outputs(plain), outputs(model))


def test_layers_that_scopes_leave_out_keep_their_channels():
    algorithm = {"algorithm": "movement_sparsity", "params": WARMUP, "ignored_scopes": ["down"]}
    model = kc.compress_model(transformer(), {"compression": algorithm}, verbose=False)
    scores = np.ones((8, 12))
    scores[:, :6] = -1
    masks(model)["up"].importance.assign(scores)
    move(model, 3)
    assert np.array_equal(masks(model)["up"].mask_values(), scores > 0)
    assert kc.strip(model).get_layer("up").kernel.shape == (8, 12)


def test_structured_masks_by_slices_go_too():
    """One score per hidden unit in both of its weights, and one per channel of a head."""
    structures = [
        {"mode": "per_dim", "axis": 0, "target_scopes": ["up", "{re}query|key|value"]},
        {"mode": "per_dim", "axis": 1, "target_scopes": ["down", "{re}output"]},
    ]
    model = compressed(transformer(), structures)
    for name, mask in masks(model).items():
        scores = np.ones(mask.importance.shape)
        if name in ("up", "down"):
            scores.ravel()[:3] = -1
        elif name.endswith("output"):
            scores[2] = -1
        elif name != "head":
            scores[:, 2] = -1
        mask.importance.assign(scores)
    move(model, 3)
    expected = outputs(model)
    for smaller in (kc.strip(model), kc.strip(kc.shrink(model))):
        assert smaller.get_layer("attention-key").kernel.shape == (8, 3, 2)
        assert smaller.get_layer("up").kernel.shape == (8, 9)
        assert_same(outputs(smaller), expected)


@pytest.mark.parametrize("inner", [[2, 2], [3, 1], [4, 4]])
def test_blocks_can_be_cut_once_they_are_fixed(inner, tmp_path):
    """Also where what stays is no whole number of the blocks of both weights."""
    structures = [
        {"mode": "block", "sparse_factors": [4, 2], "target_scopes": "up"},
        {"mode": "block", "sparse_factors": inner[::-1], "target_scopes": "down"},
        {"mode": "per_dim", "axis": 0, "target_scopes": ["{re}output"]},
        {"mode": "block", "sparse_factors": [4, 2], "target_scopes": ["{re}query|key|value"]},
    ]
    model = compressed(transformer(), structures)
    for name, mask in masks(model).items():
        scores = np.ones(mask.importance.shape)
        if name == "up":
            scores[:, 1:] = -1
        if name == "down":
            scores[-1:] = -1
            off = 12 // len(scores)
        if name[:12] in ("attention-qu", "attention-ke", "attention-va"):
            scores[:, 0] = -1
        mask.importance.assign(scores)
    move(model, 3)
    expected = outputs(model)
    assert kc.strip(model).get_layer("up").kernel.shape == (8, 12 - off)
    small = kc.shrink(model)
    assert_same(outputs(small), expected)
    assert small.config.algorithms[0].sparsity(small) == 0.0
    small.compile(keras.optimizers.SGD(0.01), "mse")
    small.train_on_batch(np.ones((2, 5, 8), "float32"), np.ones((2, 5, 3), "float32"))
    small.save(tmp_path / "small.keras")
    again = keras.models.load_model(tmp_path / "small.keras")
    assert np.array_equal(outputs(again), outputs(small))
    assert_same(outputs(kc.strip(small)), outputs(small))


def test_the_plan_names_masks_of_channels():
    config = {"compression": {"algorithm": "movement_sparsity", "params": WARMUP}}
    entries = {(e.layer, e.weight): e.description for e in kc.plan(transformer(), config).weights}
    assert entries["up", "kernel"] == "learnt mask of single weights, mask of 12 channels"
    assert entries["up", "bias"] == "mask of 12 channels"
    assert entries["head", "kernel"] == "learnt mask of single weights"
    assert "whole channels" in str(kc.plan(transformer(), config))


def test_quantizers_come_after_the_masks():
    algorithms = [{"algorithm": "quantization"}, {"algorithm": "movement_sparsity"}]
    algorithms[1]["params"] = WARMUP
    x = np.ones((4, 8), "float32")
    model = kc.compress_model(network(), {"compression": algorithms}, data=x, verbose=False)
    movement = model.config.algorithms[1]
    for entry in movement.masked(model):
        axis = -1 if entry.layer.name == "first" else 0
        parity = np.indices(entry.mask.importance.shape)[axis] % 2
        entry.mask.importance.assign(parity * 2.0 - 1)
    movement.begin_epoch(model, 3)
    kernel = numpy(model.get_layer("first").kernel)
    assert not kernel[:, ::2].any() and kernel[:, 1::2].any(0).all()
    expected = numpy(model(x, training=False))
    plain = kc.strip(model)
    assert plain.get_layer("first").kernel.shape == (8, 8)
    assert_same(numpy(plain(x)), expected)


# Going on


def test_a_run_that_was_saved_goes_on(tmp_path):
    model = compressed(enable_structured_masking=False)
    fitted(model, 2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.progress["movement_sparsity"] == model.progress["movement_sparsity"]
    for name, mask in masks(model).items():
        for variable in ("importance", "threshold", "factor"):
            expected = numpy(getattr(mask, variable))
            assert np.array_equal(numpy(getattr(masks(again)[name], variable)), expected)
    fitted(again, 2)
    assert again.progress["movement_sparsity"]["frozen"]
    first = model.progress["movement_sparsity"]["first_threshold"]
    assert again.progress["movement_sparsity"]["first_threshold"] == first


def test_fixed_channels_are_saved(tmp_path):
    model = switched()
    move(model, 3)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(outputs(again), outputs(model))
    assert kc.strip(again).get_layer("up").kernel.shape == (8, 9)
    move(again, 4)
    assert np.array_equal(outputs(again), outputs(model))


def test_training_goes_on_smaller_after_the_warm_up():
    model = switched(warmup_start_epoch=0, warmup_end_epoch=1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((8, 5, 8), "float32"), np.zeros((8, 5, 3), "float32")
    callbacks = [kc.callbacks.Compress(shrink=True)]
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    assert model.get_layer("up").raw_weight("kernel").shape == (8, 9)
    assert model.config.algorithms[0].masks_are_final(model)
