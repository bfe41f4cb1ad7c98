"""Sensitivity: what is shown, and what is refused."""

import json

import numpy as np
import pytest
from sensitivity_helpers import (
    PRUNING,
    QUANTIZATION,
    WEIGHTS,
    chain,
    config,
    samples,
    uncompiled,
)

from keras_compress.sensitivity import LayerSensitivity, Sensitivity, Suggestion, sensitivity


def test_table_and_dictionary():
    entries = (LayerSensitivity("b", 0.5, 0.4, ("b", "c")), LayerSensitivity("a", 0.9, 0.0, ("a",)))
    found = Sensitivity("accuracy", 0.9, 0.4, entries, Suggestion(("b", "c"), 0.875, 0.05))
    text = str(found)
    assert "accuracy: 0.9 in float, 0.4 compressed" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["b,"] == ["b,", "c", "0.5", "0.4", "█" * 30]
    assert rows["a"] == ["a", "0.9", "0"]
    assert 'With "ignored_scopes": ["b", "c"]: 0.875 (at most 0.05 worse than in float).' in text
    assert "█" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict())) == {
        "metric": "accuracy",
        "baseline": 0.9,
        "compressed": 0.4,
        "layers": [
            {"layer": "b", "value": 0.5, "drop": 0.4, "members": ["b", "c"]},
            {"layer": "a", "value": 0.9, "drop": 0.0, "members": ["a"]},
        ],
        "suggestion": {"ignored_scopes": ["b", "c"], "value": 0.875, "budget": 0.05},
        "note": "",
    }
    nothing = Sensitivity("accuracy", 0.9, 0.9, (), Suggestion((), 0.9, 0.05))
    assert "With nothing left out: 0.9" in str(nothing)
    assert Sensitivity("accuracy", 0.9, 0.9, ()).to_dict()["suggestion"] is None


def test_progress_goes_to_the_error_stream(capsys):
    model = chain()
    sensitivity(model, config(WEIGHTS), samples(model))
    assert capsys.readouterr().out == ""


BAD = {
    "mode": ({"mode": "up"}, "Expected mode 'auto', 'min' or 'max'. Received: mode='up'"),
    "no budget": ({"suggest": True}, "Expected `budget`.*Received: budget=None"),
    "budget alone": ({"budget": 0.1}, "`budget` is for `suggest=True`. Received: suggest=False"),
    "negative": ({"suggest": True, "budget": -0.1}, "budget of 0 or more. Received: budget=-0.1"),
    "infinite": ({"suggest": True, "budget": np.inf}, "budget of 0 or more. Received: budget=inf"),
    "samples": ({"samples": 0}, "samples of at least 1. Received: samples=0"),
    "metric": ({"metric": "acuracy"}, "name of a metric of Keras.*metric='acuracy'"),
    "loss": ({"metric": "loss"}, "compiled with a loss, for `metric` 'loss'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, message = BAD[case]
    model = uncompiled(chain())
    with pytest.raises(ValueError, match=message):
        sensitivity(model, config(WEIGHTS), samples(model), **arguments, verbose=False)


@pytest.mark.parametrize("name", ["rb_sparsity", "movement_sparsity", "taylor"])
def test_masks_that_only_training_brings(name):
    params = {"warmup_start_epoch": 0, "warmup_end_epoch": 1}
    params |= {"importance_regularization_factor": 0.1}
    entry = {"algorithm": name} | ({"params": params} if name == "movement_sparsity" else {})
    if name == "taylor":
        entry = PRUNING | {"params": PRUNING["params"] | {"filter_importance": "taylor"}}
    with pytest.raises(ValueError, match=f"Received: .*{name}.*only training brings"):
        sensitivity(chain(), config(entry), None, verbose=False)


def test_nothing_to_compress():
    model = chain()
    nothing = QUANTIZATION | {"ignored_scopes": ["{re}."]}
    with pytest.raises(ValueError, match="compresses at least one layer. Received: model 'chain'"):
        sensitivity(model, config(nothing), samples(model), verbose=False)


def test_a_float_model_without_a_finite_metric():
    model = chain()
    with pytest.raises(ValueError, match="finite number for the float model.*'bad', nan"):

        def bad(judged):
            return float("nan")

        sensitivity(model, config(WEIGHTS), samples(model), bad, verbose=False)


def test_ranges_need_data():
    model = chain()
    with pytest.raises(ValueError, match="quantizers without a range"):
        sensitivity(model, config(QUANTIZATION), None, lambda judged: 1.0, verbose=False)
