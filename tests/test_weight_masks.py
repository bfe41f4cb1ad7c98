"""Masks of single weights: given, drawn at random in training, and made from importance scores."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, layer_gradients, numpy
from keras import layers

from keras_compress.weight_masks import LearnedMask, MovementMask, RBMask, WeightMask

MASKS = {
    "given": WeightMask,
    "random": RBMask,
    "movement": MovementMask,
    "blocks": lambda **kwargs: MovementMask("block", sparse_factors=(2, 2), **kwargs),
    "slices": lambda **kwargs: MovementMask("per_dim", axis=-1, **kwargs),
}
LEARNED = [name for name in MASKS if name != "given"]
every_mask = pytest.mark.parametrize("name", MASKS)
every_learned_mask = pytest.mark.parametrize("name", LEARNED)
SWITCHES = np.array([[1, 0, 1, 1], [0, 1, 1, 0]])


def built(mask, shape):
    mask.build(shape)
    return mask


def samples(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_random_scores(mask, seed=3):
    """Give a learnt mask scores of both signs, with the threshold at zero."""
    scores = scores_of(mask)
    scores.assign(samples(*scores.shape, seed=seed))
    if isinstance(mask, MovementMask):
        mask.threshold.assign(0.0)
    return mask


def scores_of(mask):
    (scores,) = mask.trainable_variables
    return scores


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def inference_gradients(mask, x, upstream):
    call = mask.call
    mask.call = lambda inputs, training=None: call(inputs, training=False)
    return layer_gradients(mask, x, upstream)


@every_mask
def test_a_new_mask_leaves_everything_on(name):
    mask = built(MASKS[name](), (2, 4))
    x = samples(2, 4)
    np.testing.assert_array_equal(numpy(mask(x)), x)
    np.testing.assert_array_equal(mask.mask_values(), np.ones((2, 4), bool))
    assert mask.mask_values().dtype == bool and mask.sparsity == 0.0
    assert keras.backend.standardize_dtype(mask.mask.dtype) == "bool" and not mask.mask.trainable


@every_mask
def test_weights_are_switched_off(name):
    mask = built(MASKS[name](), (2, 4))
    mask.set_mask(SWITCHES)
    x, upstream = samples(2, 4), samples(2, 4, seed=1)
    y, (gradient, *scores) = layer_gradients(mask, x, upstream)
    np.testing.assert_array_equal(y, x * SWITCHES)
    np.testing.assert_array_equal(gradient, upstream * SWITCHES)
    for each in scores:
        np.testing.assert_array_equal(each, 0)
    np.testing.assert_array_equal(numpy(mask(y)), y)
    np.testing.assert_array_equal(numpy(mask(0 * x)), 0 * x)
    np.testing.assert_array_equal(mask.mask_values(), SWITCHES == 1)
    assert mask.sparsity == pytest.approx(3 / 8)
    mask.mask_values()[:] = False  # a copy
    np.testing.assert_array_equal(mask.mask_values(), SWITCHES == 1)


@every_mask
def test_bad_masks_are_refused(name):
    with pytest.raises(ValueError, match="Expected a mask that has been built. Received: 'new'"):
        MASKS[name](name="new").mask_values()
    with pytest.raises(ValueError, match="Expected a mask that has been built. Received: 'new'"):
        MASKS[name](name="new").set_mask(SWITCHES)
    mask = built(MASKS[name](), (2, 4))
    with pytest.raises(ValueError, match=r"shape \(2, 4\). Received: values of shape \(4,\)"):
        mask.set_mask([1, 0, 1, 0])
    for value in (0.5, 2, np.nan):
        with pytest.raises(ValueError, match="Expected booleans, or ones and zeros. Received: val"):
            mask.set_mask(np.full((2, 4), value))
    if isinstance(mask, LearnedMask):
        assert not numpy(mask.frozen)  # nothing half-done


def test_what_is_switched_off_may_be_infinite():
    mask = built(WeightMask(), (3,))
    mask.set_mask([0, 0, 1])
    y, (gradient,) = layer_gradients(mask, np.array([np.inf, np.nan, 2], "f"), np.ones(3, "f"))
    np.testing.assert_array_equal(y, [0, 0, 2])
    np.testing.assert_array_equal(gradient, [0, 0, 1])


@every_learned_mask
def test_bad_arguments(name):
    with pytest.raises(ValueError, match="factor of 0 or more. Received: lr_multiplier=-1"):
        MASKS[name](lr_multiplier=-1)


def test_a_base_without_scores_is_of_no_use():
    mask = built(LearnedMask(), (2,))
    with pytest.raises(NotImplementedError, match="LearnedMask must define `_learned`"):
        mask.mask_values()


@every_mask
def test_states_are_cut_along_with_the_weight(name):
    mask = built(MASKS[name](), (4, 8))
    if isinstance(mask, LearnedMask):
        with_random_scores(mask)
    else:
        mask.set_mask(samples(4, 8) > 0)
    kept = {-2: [0, 1, 3], -1: [1, 2, 4, 5, 6]}
    x = samples(4, 8, seed=1)
    if name == "blocks":  # no scores can be left out of a block; a fixed mask needs none
        assert mask.state_axes(mask.importance) == (None, None)
        mask.fix()
        kept = {-2: [0, 3], -1: [1, 2, 4, 7]}

    def cut(value, axes):
        for i, axis in enumerate(axes):
            if axis is not None and value.shape[i] > 1:
                value = np.take(value, kept[axis], axis=i)
        return value

    small = built(MASKS[name](), (len(kept[-2]), len(kept[-1])))
    for before, after in zip(mask.weights, small.weights, strict=True):
        if None not in mask.state_axes(before):
            after.assign(cut(numpy(before), mask.state_axes(before)))
    np.testing.assert_array_equal(numpy(small(cut(x, (-2, -1)))), cut(numpy(mask(x)), (-2, -1)))


@every_mask
def test_an_axis_of_unknown_size_has_one_value(name):
    mask = MASKS[name]() if name != "blocks" else MovementMask("block", sparse_factors=(2,))
    mask.build((None, 4))
    mask.set_mask([[1, 0, 1, 1]])
    x = samples(3, 4)
    np.testing.assert_array_equal(numpy(mask(x)), x * [1, 0, 1, 1])


# Masks that are drawn at random.


def draws_of(seed, shape, count=1):
    """Return what `RBMask(seed=seed)` adds to its logits in its n-th call, from the formula."""
    generator = keras.random.SeedGenerator(seed)
    for _ in range(count):
        u = numpy(keras.random.uniform(shape, dtype="float32", seed=generator))
    u = np.clip(u.astype("float64"), 1e-6, 1 - 1e-6)
    return np.log(u / (1 - u))


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.5])
def test_a_drawn_mask_and_its_gradient(lr_multiplier):
    mask = with_random_scores(built(RBMask(lr_multiplier=lr_multiplier, seed=5), (6, 8)))
    logits = numpy(mask.logits)
    x, upstream = samples(6, 8, seed=1), samples(6, 8, seed=2)
    for call in (1, 2):
        y, (dx, dm) = layer_gradients(mask, x, upstream)
        # On JAX, a stateless call leaves the state of the generator as it was.
        s = sigmoid(logits + draws_of(5, (6, 8), 1 if BACKEND == "jax" else call))
        np.testing.assert_array_equal(y, x * (s > 0.5))
        np.testing.assert_array_equal(dx, upstream * (s > 0.5))
        expected = lr_multiplier * upstream * x * s * (1 - s)
        np.testing.assert_allclose(dm, expected, rtol=1e-4, atol=1e-6)
    y, (dx, dm) = inference_gradients(mask, x, upstream)
    s = sigmoid(logits)
    np.testing.assert_array_equal(y, x * (s > 0.5))
    np.testing.assert_array_equal(dx, upstream * (s > 0.5))
    expected = lr_multiplier * upstream * x * s * (1 - s)
    np.testing.assert_allclose(dm, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mask.mask_values(), logits > 0)


def test_how_often_weights_are_on():
    for probability in (0.99, 0.3):
        mask = built(RBMask(initial_probability=probability, seed=1), (400, 500))
        assert mask.sparsity == float(probability < 0.5)
        on = np.mean([numpy(mask(np.ones((400, 500), "f"), training=True)) for _ in range(2)])
        deviation = np.sqrt(probability * (1 - probability) / 400_000)
        assert abs(on - probability) < 4 * deviation
    assert numpy(built(RBMask(), ()).logits) == pytest.approx(np.log(99), rel=1e-6)


def test_every_call_draws_anew_and_a_seed_repeats_it():
    x = np.ones((50, 20), "f")

    def drawn(seed):
        mask = built(RBMask(initial_probability=0.6, seed=seed), x.shape)
        return [numpy(mask(x, training=True)) for _ in range(2)]

    first, second = drawn(1)
    assert (first != second).any() and (first != drawn(2)[0]).any()
    np.testing.assert_array_equal(first, drawn(1)[0])
    np.testing.assert_array_equal(second, drawn(1)[1])


def test_bad_probabilities_are_refused():
    for probability in (0, 1, 1.5):
        with pytest.raises(ValueError, match="Expected a probability.*initial_probability="):
            RBMask(initial_probability=probability)


class Loss(layers.Layer):
    """Multiplies its input by what a mask contributes to a loss."""

    def __init__(self, mask, term):
        super().__init__()
        self.mask = mask
        self.term = term
        self.built = True

    def call(self, inputs, training=None):
        return inputs * self.term(self.mask)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_number_of_weights_kept(fixed):
    mask = with_random_scores(built(RBMask(lr_multiplier=0.5), (6, 8)))
    logits = numpy(mask.logits)
    if fixed:
        mask.fix()
    kept, size = mask.kept()
    assert size == 48 and numpy(kept) == (logits > 0).sum()
    loss = Loss(mask, lambda mask: mask.kept()[0])
    _, (_, dm) = layer_gradients(loss, np.float32(1), np.float32(3))
    s = sigmoid(logits)
    np.testing.assert_allclose(dm, 0 * s if fixed else 3 * 0.5 * s * (1 - s), rtol=1e-4)


# Importance scores.

STRUCTURES = {
    "fine": ({}, (1, 1)),
    "block": ({"sparse_factors": (3, 4)}, (3, 4)),
    "per_dim": ({"axis": -1}, (6, 1)),
}


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.5])
@pytest.mark.parametrize("mode", STRUCTURES)
def test_movement_masks_and_their_gradients(mode, lr_multiplier):
    options, block = STRUCTURES[mode]
    mask = built(MovementMask(mode, lr_multiplier=lr_multiplier, **options), (6, 8))
    assert mask.block == block
    assert tuple(mask.importance.shape) == (6 // block[0], 8 // block[1])
    np.testing.assert_array_equal(numpy(mask.importance), 0)
    with_random_scores(mask)
    on = np.kron(numpy(mask.importance), np.ones(block)) > 0
    assert 0 < on.mean() < 1
    x, upstream = samples(6, 8, seed=1), samples(6, 8, seed=2)
    sums = (upstream * x).reshape(6 // block[0], block[0], 8 // block[1], block[1]).sum((1, 3))
    for gradients in (layer_gradients, inference_gradients):
        y, (dx, scores) = gradients(mask, x, upstream)
        np.testing.assert_array_equal(y, x * on)
        np.testing.assert_array_equal(dx, upstream * on)
        np.testing.assert_allclose(scores, lr_multiplier * sums, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mask.mask_values(), on)


@pytest.mark.parametrize("mode", STRUCTURES)
@pytest.mark.parametrize("shape", [(6, 8), (30, 20), (3, 4)])
def test_two_percent_stay_on(mode, shape):
    mask = with_random_scores(built(MovementMask(mode, **STRUCTURES[mode][0]), shape))
    importance = np.kron(numpy(mask.importance), np.ones(mask.block, "f"))
    for threshold in (-np.inf, -1.0, 0.0, 1.5, 2.0, 2.5, 9.0):
        mask.threshold.assign(threshold)
        bound = min(threshold, np.quantile(importance.astype("float64"), 0.98))
        np.testing.assert_array_equal(mask.mask_values(), importance > bound)


def test_blocks_of_other_ranks():
    mask = built(MovementMask("block", sparse_factors=[4]), (2, 3, 8))
    assert mask.block == (1, 1, 4) and mask.get_config()["sparse_factors"] == (4,)
    mask = built(MovementMask("per_dim", axis=-2), (2, 3, 8))
    assert mask.block == (2, 1, 8) and tuple(mask.importance.shape) == (1, 3, 1)
    assert built(MovementMask(), ()).block == ()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("mode", STRUCTURES)
def test_the_penalty(mode, fixed):
    options, block = STRUCTURES[mode]
    mask = with_random_scores(built(MovementMask(mode, lr_multiplier=0.5, **options), (6, 8)))
    scores = numpy(mask.importance)
    if fixed:
        mask.fix()
    size = 0 if fixed else np.prod(block)
    expected = size * sigmoid(scores).mean()
    np.testing.assert_allclose(numpy(mask.penalty()), expected, rtol=1e-5)
    _, (_, gradient) = layer_gradients(
        Loss(mask, MovementMask.penalty), np.float32(1), np.float32(3)
    )
    s = sigmoid(scores)
    expected = 3 * 0.5 * size / scores.size * s * (1 - s)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_structures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one of \('fine', 'block', 'per_dim'\).*mode='rows'"):
        MovementMask("rows")
    for mode, factors in (("block", None), ("fine", (1, 1)), ("per_dim", (2,))):
        with pytest.raises(ValueError, match="Expected `sparse_factors` with the mode 'block'"):
            MovementMask(mode, sparse_factors=factors, axis=-1 if mode == "per_dim" else None)
    for mode, axis in (("per_dim", None), ("fine", -1)):
        with pytest.raises(ValueError, match="Expected `axis` with the mode 'per_dim'"):
            MovementMask(mode, axis=axis)
    for axis in (0, 1, -1.0, True):
        with pytest.raises(ValueError, match="counted from the end. Received: axis="):
            MovementMask("per_dim", axis=axis)
    for factors in ((), (0, 1), (2.0,), 4, (True,)):
        with pytest.raises(ValueError, match="positive whole numbers.*Received: sparse_factors="):
            MovementMask("block", sparse_factors=factors)
    for factors in ((2, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"blocks that divide.*weight of shape \(4, 4\)"):
            built(MovementMask("block", sparse_factors=factors), (4, 4))
    with pytest.raises(ValueError, match=r"an axis of the weight. Received: axis=-3.*\(4, 4\)"):
        built(MovementMask("per_dim", axis=-3), (4, 4))


@every_learned_mask
def test_fixing_what_was_learnt(name):
    mask = with_random_scores(built(MASKS[name](), (4, 8)))
    learnt = mask.mask_values()
    assert 0 < mask.sparsity < 1
    mask.fix()
    scores_of(mask).assign(-samples(*scores_of(mask).shape, seed=3))  # as momentum may do
    x = samples(4, 8)
    for training in (True, False):
        np.testing.assert_array_equal(numpy(mask(x, training=training)), x * learnt)
    np.testing.assert_array_equal(mask.mask_values(), learnt)
    mask.fix(~learnt)
    np.testing.assert_array_equal(mask.mask_values(), ~learnt)
    scores_of(mask).assign(samples(*scores_of(mask).shape, seed=3))
    mask.frozen.assign(False)
    np.testing.assert_array_equal(mask.mask_values(), learnt)
