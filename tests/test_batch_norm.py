"""Batch-norm adaptation against averages computed in NumPy."""

import keras
import models
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers

import keras_compress as kc
from keras_compress.training.batch_norm import adapt_to_batches


def batches(shape, count=3, samples=6):
    random = np.random.default_rng(0)
    return [[random.normal(2, 3, (samples - k, *shape)).astype("float32")] for k in range(count)]


def two_norms():
    inputs = keras.Input((5,), name="features")
    x = layers.BatchNormalization(momentum=0.7, name="first")(inputs)
    x = layers.Dropout(0.5, name="dropout")(x)
    x = layers.BatchNormalization(name="second")(x)
    return models.randomize(keras.Model(inputs, x))


def averages(model, data):
    """The plain average over batches of the statistics of two stacked normalizations."""
    first, second = (model.get_layer(name) for name in ("first", "second"))
    means, variances = [], []
    for (x,) in data:
        y = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + first.epsilon)
        y = y * numpy(first.gamma) + numpy(first.beta)
        means.append([x.mean(axis=0), y.mean(axis=0)])
        variances.append([x.var(axis=0), y.var(axis=0)])
    assert second.built
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def test_statistics_are_the_average_over_the_batches():
    model = two_norms()
    data = batches((5,))
    means, variances = averages(model, data)
    adapt_to_batches(model, data)
    for layer, mean, variance in zip(("first", "second"), means, variances, strict=True):
        norm = model.get_layer(layer)
        np.testing.assert_allclose(numpy(norm.moving_mean), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(numpy(norm.moving_variance), variance, rtol=1e-5)
    assert model.get_layer("first").momentum == 0.7


@pytest.mark.parametrize("name", ["sequential", "subclassed", "subclassed_blocks"])
def test_nothing_else_changes(name):
    model = models.make(name)
    before = {v.path: numpy(v).copy() for v in model.variables}
    shape = models.inputs_for(model).shape[1:]
    adapt_to_batches(model, batches(shape, count=2))
    for variable in model.variables:
        changed = np.any(numpy(variable) != before[variable.path])
        assert changed == ("moving_" in variable.path), variable.path


def test_frozen_layers_keep_their_statistics():
    model = two_norms()
    model.get_layer("first").trainable = False
    before = numpy(model.get_layer("first").moving_mean).copy()
    adapt_to_batches(model, batches((5,)))
    np.testing.assert_array_equal(numpy(model.get_layer("first").moving_mean), before)
    assert np.any(numpy(model.get_layer("second").moving_mean) != 0)


def test_a_shared_layer_averages_over_its_calls():
    inputs = keras.Input((5,), name="features")
    norm = layers.BatchNormalization(name="norm")
    a = norm(inputs)
    model = keras.Model(inputs, norm(layers.Rescaling(3.0, name="scale")(a)))
    data = batches((5,), count=2)
    adapt_to_batches(model, data)
    means = []
    for (x,) in data:
        y = 3 * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + norm.epsilon)
        means += [x.mean(axis=0), y.mean(axis=0)]
    np.testing.assert_allclose(numpy(norm.moving_mean), np.mean(means, axis=0), atol=1e-5)


def test_momentum_comes_back_after_an_error():
    model = two_norms()
    with pytest.raises(Exception, match="."):
        adapt_to_batches(model, [[np.zeros((2, 9), "float32")]])
    assert model.get_layer("first").momentum == 0.7


def test_a_model_without_normalization_reads_no_data():
    model = models.make("concat")
    adapt_to_batches(model, iter(()))
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in model.layers)


# The public function


def statistics(model):
    return [numpy(variable) for variable in model.variables if "moving_" in variable.path]


def test_any_data_gives_the_statistics_of_its_batches():
    (x,) = batches((5,), count=1, samples=64)[0]
    expected = two_norms()
    adapt_to_batches(expected, [[x[:32]], [x[32:]]])
    labelled = [(x[:32], np.zeros(32)), (x[32:], np.zeros(32))]
    for data in (x, (x, np.zeros(64)), labelled, iter(labelled)):
        model = two_norms()
        kc.adapt_batch_norm(model, data)
        for one, other in zip(statistics(model), statistics(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_no_more_samples_are_read_than_asked_for():
    (x,) = batches((5,), count=1, samples=64)[0]
    expected, model = two_norms(), two_norms()
    adapt_to_batches(expected, [[x[:32]]])
    read = []

    def data():
        for start in (0, 32):
            read.append(start)
            yield x[start : start + 32]

    kc.adapt_batch_norm(model, data(), samples=20)
    assert read == [0]
    for one, other in zip(statistics(model), statistics(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("data", "samples", "message"),
    [
        (np.zeros((4, 5)), 0, "at least 1. Received: samples=0"),
        (np.zeros((4, 5)), True, "Received: samples=True"),
        (np.zeros((4, 3)), 8, r"does not fit the model's input 'features'"),
        ([], 8, "at least one sample"),
        ([(np.zeros((4, 5)), 1), (np.full((4, 5), np.nan), 1)], 8, "NaN"),
    ],
)
def test_bad_data_changes_nothing(data, samples, message):
    model = two_norms()
    before = [numpy(variable).copy() for variable in model.variables]
    with pytest.raises(ValueError, match=message):
        kc.adapt_batch_norm(model, data, samples)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)
