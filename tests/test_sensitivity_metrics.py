"""Sensitivity: by which metric a layer is judged."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy
from sensitivity_helpers import QUANTIZATION, WEIGHTS, chain, config, samples, uncompiled

from keras_compress.sensitivity import sensitivity


def test_metrics_are_those_of_keras():
    model = chain()
    x, _ = samples(model)
    data = x, np.random.default_rng(1).integers(0, 4, len(x))
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    for metric in ("accuracy", keras.metrics.SparseCategoricalAccuracy(name="accuracy"), "loss"):
        found = sensitivity(model, config(WEIGHTS), data, metric, verbose=False)
        name = metric if metric == "loss" else "accuracy"
        assert found.metric == name
        assert found.baseline == pytest.approx(expected[name], rel=1e-6)
        for entry in found.layers:
            sign = 1 if name == "loss" else -1
            assert entry.drop == pytest.approx(sign * (entry.value - found.baseline))


def test_a_model_that_is_not_compiled_has_metrics_too():
    model = uncompiled(chain())
    found = sensitivity(model, config(WEIGHTS), samples(model), verbose=False)
    assert found.baseline == 1
    assert not model.compiled


def test_sample_weights_count_in_a_loss():
    model = chain()
    x, y = samples(model)
    weights = np.linspace(0, 2, len(x)).astype("float32")
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)[0]
    found = sensitivity(model, config(WEIGHTS), (x, y, weights), "loss", verbose=False)
    assert found.baseline == pytest.approx(expected, rel=1e-6)


def test_a_function_needs_no_labels():
    model = chain()
    x, _ = samples(model)

    def spread(judged):
        return numpy(judged(x)).std()

    found = sensitivity(model, config(QUANTIZATION), x, metric=spread, verbose=False)
    assert found.metric == "spread"
    assert found.baseline == pytest.approx(numpy(model(x)).std())


def test_the_mode_turns_the_drop_around():
    model = chain()
    data = samples(model)
    drops = []
    for mode in ("max", "min"):
        found = sensitivity(model, config(WEIGHTS), data, mode=mode, verbose=False)
        drops.append({e.layer: e.drop for e in found.layers})
    assert drops[0] == {name: -drop for name, drop in drops[1].items()}
    assert max(drops[0].values()) > 0


def test_what_is_not_a_number_is_the_worst():
    model = chain()
    x, _ = samples(model)
    values = iter([1.0, 0.5, 0.9, float("nan"), 0.8])
    found = sensitivity(model, config(WEIGHTS), x, lambda m: next(values), verbose=False)
    assert [(e.layer, e.drop) for e in found.layers] == [
        ("second", np.inf),
        ("head", pytest.approx(0.2)),
        ("first", pytest.approx(0.1)),
    ]
    assert "second" in str(found)
