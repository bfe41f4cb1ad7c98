"""Recurrent classifiers on real sequences: handwritten digits, read row by row."""

import keras
import numpy as np
import openvino as ov
import pytest
from backend_helpers import BACKEND
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_compress as kc

CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    },
}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    rows = (data.images / 16).astype("float32")
    return train_test_split(rows, data.target, test_size=450, random_state=0, stratify=data.target)


def classifier(recurrent):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8), name="rows")
    x = layers.Bidirectional(recurrent(24, return_sequences=True), name="both")(inputs)
    x = recurrent(32, name="last")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def fitted(model, digits, epochs, rate):
    train, test, train_labels, test_labels = digits
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    model.fit(train, train_labels, batch_size=64, epochs=epochs, verbose=0)
    return model.evaluate(test, test_labels, verbose=0)[1]


@pytest.mark.parametrize(
    "recurrent", [layers.LSTM, pytest.param(layers.GRU, marks=pytest.mark.slow)]
)
def test_int8_keeps_the_accuracy_to_one_point(recurrent, digits, tmp_path):
    if BACKEND == "torch":
        pytest.skip("recurrent layers train step by step on torch: minutes")
    model = classifier(recurrent)
    before = fitted(model, digits, epochs=40, rate=5e-3)
    compressed = kc.compress_model(model, CONFIG, data=digits[0], verbose=False)
    after = fitted(compressed, digits, epochs=2, rate=1e-3)
    assert before > 0.95
    assert after >= before - 0.01

    kc.export(model, tmp_path / "float.xml", verify=False)
    report = kc.export(compressed, tmp_path / "int8.xml", data=digits[1])
    assert report.outputs[0].top1 == 1.0 and report.relative < 1e-3
    sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.35 * sizes[1]  # steps and biases weigh in a small network
    ir = ov.Core().read_model(tmp_path / "int8.xml")
    codes = [op for op in ir.get_ops() if op.get_friendly_name().endswith("kernel/codes")]
    assert len(codes) == 7  # two of each recurrent layer, one of the head
    assert {op.get_element_type().get_type_name() for op in codes} == {"i8"}


def test_the_plan_says_that_the_loop_is_computed_in_float(digits):
    plan = kc.plan(classifier(layers.GRU), CONFIG)
    reasons = {entry.layer: entry.reason for entry in plan.untouched}
    assert "loop over time steps in float" in reasons["last"]
    assert np.isclose(sum(entry.share for entry in plan.untouched), 1.0, atol=0.02)
