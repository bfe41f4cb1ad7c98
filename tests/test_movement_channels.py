"""Movement sparsity after the warm-up: whole channels that go, and runs that go on."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from movement_helpers import WARMUP, compressed, fitted, masks, move, network, transformer

import keras_compress as kc

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


def test_zeros_that_are_lost_are_told_of(caplog):
    model = switched()
    for mask in masks(model).values():
        mask.importance.assign(np.indices(mask.importance.shape).sum(0) % 2 * 2.0 - 1)
    move(model, 3)  # every second weight is off, and no channel
    (record,) = caplog.records
    head = masks(model)["head"].mask_values()
    total = sum(mask.mask_values().size for mask in masks(model).values())
    text = f"of a sparsity of 50.0%, {50 * head.size / total:.1f}% is left as whole channels"
    assert text in record.message


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
