"""Movement sparsity as a user meets it."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers
from movement_helpers import (
    WARMUP,
    added_loss,
    compressed,
    data,
    fitted,
    masks,
    move,
    network,
    set_scores,
    sigmoid,
    transformer,
)

import keras_compress as kc
from keras_compress.algorithms.movement_structure import first_threshold
from keras_compress.options import ConfigError
from keras_compress.weight_masks import MovementMask

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
