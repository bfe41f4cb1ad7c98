"""Sensitivity: the search for scopes."""

import re

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers
from sensitivity_helpers import (
    QUANTIZATION,
    SPARSITY,
    WEIGHTS,
    Recorder,
    chain,
    compiled,
    config,
    final,
    residual,
    samples,
    scoped,
)

from keras_compress import demo
from keras_compress.sensitivity import Suggestion, sensitivity


def costs(table, again=None):
    """Return a metric that looks up which layers are rounded: minus the cost of that set.

    Args:
        table: {names of the layers, joined by blanks: cost}.
        again: the same for models that cannot be switched, where it differs.
    """

    def score(model):
        on, can_switch = [], False
        for name in ("first", "second", "head"):
            layer = model.get_layer(name)
            if not hasattr(layer, "raw_weight"):
                continue
            can_switch |= any(getattr(q, "staged", False) for q in layer.transforms_of("kernel"))
            if not np.array_equal(layer.effective_weight("kernel"), layer.raw_weight("kernel")):
                on.append(name)
        found = table if can_switch or again is None else table | again
        return 0.0 - found[" ".join(on)]

    return score


ADDED = {
    "": 0,
    "first": 5,
    "second": 3,
    "head": 1,
    "first second": 8,
    "first head": 6,
    "second head": 4,
    "first second head": 9,
}
# The head costs much beside any other, and the first layer only beside the head.
JOINT = {
    "": 0,
    "first": 5,
    "second": 1,
    "head": 3,
    "first second": 1,
    "first head": 9,
    "second head": 9,
    "first second head": 9,
}


@pytest.mark.parametrize(
    ("table", "budget", "scopes", "value"),
    [
        (ADDED, 9, (), -9),
        (ADDED, 4.5, ("first",), -4),
        (ADDED, 4, ("first",), -4),
        (ADDED, 3.9, ("first", "second"), -1),
        (JOINT, 2, ("head",), -1),
    ],
)
def test_suggestion_by_hand(table, budget, scopes, value):
    model = chain()
    x, _ = samples(model)
    found = sensitivity(
        model, config(WEIGHTS), x, costs(table), suggest=True, budget=budget, verbose=False
    )
    assert found.suggestion == Suggestion(scopes, value, budget)
    assert [e.drop for e in found.layers] == sorted((5, 3, 1), reverse=True)


def test_what_counts_is_the_model_that_is_compressed_with_the_scopes():
    model = chain()
    x, _ = samples(model)
    score = costs(ADDED, again={"second head": 7})
    found = sensitivity(model, config(WEIGHTS), x, score, suggest=True, budget=4, verbose=False)
    assert found.suggestion == Suggestion(("first", "second"), -1, 4)


def test_a_budget_that_cannot_be_kept():
    model = chain()
    x, _ = samples(model)
    score = costs(ADDED, again={"": 2})
    asked = {"suggest": True, "budget": 0, "verbose": False}
    found = sensitivity(model, config(WEIGHTS), x, score, **asked)
    assert found.suggestion is None and found.layers
    assert re.search(r"Nothing to suggest: for a budget of 0.*score=-2 \(0 in float", found.note)
    assert found.note in " ".join(str(found).split())
    refused = sensitivity(model, config(SPARSITY), x, costs(ADDED), **asked)
    assert "`compress_model` refuses" in refused.note
    assert "['first', 'second', 'head']" in refused.note
    assert sensitivity(model, config(WEIGHTS), x, costs(ADDED), verbose=False).note == ""


def test_sparsity_leaves_operations_without_weights_to_quantization():
    """Its `ignored_scopes` take layers with weights only."""
    model = residual()
    algorithms = [SPARSITY, QUANTIZATION]
    x, _ = data = samples(model)
    record = Recorder(x, numpy(model(x)))
    full = sensitivity(model, config(*algorithms), data, record, mode="min", verbose=False)
    assert "add" in [e.layer for e in full.layers]
    found = sensitivity(
        *(model, config(*algorithms), data, record),
        suggest=True,
        budget=0.5 * full.compressed,
        mode="min",
        verbose=False,
    )
    scopes = found.suggestion.ignored_scopes
    assert scopes and "add" not in scopes
    again = final(model, scoped(scopes, *algorithms, key="ignored_scopes"), data)
    assert found.suggestion.value == pytest.approx(record(again))
    assert found.suggestion.value <= found.suggestion.budget


def test_scopes_are_added_to_those_that_are_there():
    model = chain()
    x, _ = samples(model)
    given = config(WEIGHTS | {"ignored_scopes": ["first"]})
    found = sensitivity(model, given, x, costs(ADDED), suggest=True, budget=2, verbose=False)
    assert [e.layer for e in found.layers] == ["second", "head"]
    assert found.suggestion == Suggestion(("second",), -1, 2)


def test_suggestion_for_a_trained_network():
    keras.utils.set_random_seed(0)
    (x, y), _, test = demo.load_digits()
    inputs = keras.Input((8, 8, 1), name="image")
    z = layers.Conv2D(8, 3, use_bias=False, name="stem")(inputs)
    z = layers.ReLU(name="relu")(layers.BatchNormalization(momentum=0.9, name="norm")(z))
    z = layers.Conv2D(16, 3, strides=2, activation="relu", name="body")(z)
    z = layers.Conv2D(16, 1, activation="relu", name="mix")(z)
    outputs = layers.Dense(10, name="digit")(layers.Flatten(name="flat")(z))
    model = keras.Model(inputs, outputs, name="digits")
    demo.train(model, (x, y), None, epochs=6, rate=1e-2)
    judged = test
    low = QUANTIZATION | {"activations": {"bits": 8}}
    found = sensitivity(model, config(low), judged, suggest=True, budget=0.05, verbose=False)
    assert found.baseline == pytest.approx(model.evaluate(*judged, verbose=0)[1])
    assert found.baseline > 0.9
    assert found.baseline - found.compressed > 0.05
    scopes = found.suggestion.ignored_scopes
    assert scopes and set(scopes) < {e.layer for e in found.layers}
    assert found.baseline - found.suggestion.value <= 0.05
    again = final(model, scoped(scopes, low, key="ignored_scopes"), judged)
    compiled(again)
    assert again.evaluate(*judged, verbose=0)[1] == pytest.approx(found.suggestion.value)
    left = {entry["layer"] for entry in again.plan["weights"]}
    assert left == {e.layer for e in found.layers} - set(scopes)
