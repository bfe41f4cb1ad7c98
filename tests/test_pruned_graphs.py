"""Removed equals masked, on random graphs and on the architectures of `keras.applications`."""

import hypothesis
import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from export_helpers import randomized
from hypothesis import strategies
from pruning_helpers import assert_removed_is_masked, pruning_config
from random_graphs import MOVES, random_model

LEVELS = [0.3, 0.6]
FAMILIES = {  # name -> smallest size of its images
    "ResNet50": 32,
    "ResNet50V2": 32,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "DenseNet121": 32,
    "InceptionV3": 75,
    "Xception": 71,
    "VGG16": 32,
    "NASNetMobile": 32,
    "ConvNeXtTiny": 32,
}
SMALL = ["MobileNetV3Small", "VGG16"]

moves = strategies.lists(
    strategies.tuples(strategies.sampled_from(sorted(MOVES)), strategies.integers(0, 999)),
    min_size=4,
    max_size=12,
)
random_graphs = hypothesis.given(moves=moves, level=strategies.sampled_from(LEVELS))
deterministic = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


def check(moves, level):
    keras.utils.clear_session(free_memory=False)
    assert_removed_is_masked(random_model(moves), level)


@hypothesis.settings(max_examples=25, **deterministic)
@random_graphs
def test_random_graphs(moves, level):
    check(moves, level)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hypothesis.settings(max_examples=200, **deterministic)
@random_graphs
def test_many_random_graphs(moves, level):
    check(moves, level)


@pytest.mark.parametrize("name", MOVES)
def test_every_move(name):
    """Each of them alone, and twice: whatever the random graphs happen to hold."""
    check([(name, 1), ("convolution", 2), (name, 3)], 0.6)


PARAMS = [
    {"prune_batch_norms": False},
    {"all_weights": True, "filter_importance": "L2"},
    {"filter_importance": "geometric_median", "round_to": 4},
    {"interlayer_ranking_type": "unweighted_ranking", "prune_first_conv": False},
]
MOVES_OF_ALL_KINDS = [(name, seed) for seed, name in enumerate(sorted(MOVES))]


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: next(iter(params)))
def test_other_choices(params):
    result = assert_removed_is_masked(random_model(MOVES_OF_ALL_KINDS), 0.4, **params)
    assert result.change > 1e-2


@pytest.mark.parametrize("quantity", ["parameters", "FLOPs"])
def test_other_targets(quantity):
    model = random_model(MOVES_OF_ALL_KINDS)
    target = {f"pruning_{quantity.lower()}_target": 0.3}
    config = pruning_config(**target)
    del config["compression"]["params"]["pruning_target"]
    result = assert_removed_is_masked(model, config=config)
    full, now = result.sizes[quantity]
    assert 0.3 <= 1 - now / full < 0.45


def test_pruned_again():
    """What was removed once is an ordinary model."""
    model = random_model(MOVES_OF_ALL_KINDS)
    once = assert_removed_is_masked(model, 0.3)
    twice = assert_removed_is_masked(once.small, 0.3)
    assert twice.sizes["parameters"][0] == once.sizes["parameters"][1]


def check_family(name, level):
    """Prune a family's model; what `assert_removed_is_masked` gives, with `loss`, of one step."""
    if BACKEND != "tensorflow":
        pytest.skip("the architectures run on TensorFlow; their rules are tested on every backend")
    size = FAMILIES[name]
    build = getattr(keras.applications, name)
    model = randomized(
        build(
            weights=None,
            input_shape=(size, size, 3),
            classes=10,
            classifier_activation=None,
        )
    )
    images = np.random.default_rng(0).uniform(0, 255, (4, size, size, 3)).astype("float32")
    result = assert_removed_is_masked(model, level, images)
    assert result.change > 1e-2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    result.small.compile("sgd", loss)
    result.loss = result.small.train_on_batch(images, np.arange(4))
    assert np.isfinite(result.loss)
    return result


@pytest.mark.parametrize("name", SMALL)
def test_small_architectures(name):
    check_family(name, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_architectures(name, level):
    check_family(name, level)
