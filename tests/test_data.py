"""Whatever `fit` accepts becomes batches of model inputs."""

import re

import keras
import numpy as np
import pytest

from keras_compress.data import input_batches, labelled_batches

X = np.arange(50, dtype="float32").reshape(10, 5)
Z = np.arange(30, dtype="float32").reshape(10, 3)
Y = np.zeros((10, 1))


def tensors(**shapes):
    return [keras.KerasTensor((None, *shape), name=name) for name, shape in shapes.items()]


ONE = tensors(x=(5,))
TWO = tensors(x=(5,), z=(3,))


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return X[:2] + index


def dataset(*arrays):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(4)


def read(data, inputs=ONE, samples=10):
    batches = list(input_batches(data, inputs, samples, batch_size=4))
    assert all(len(batch) == len(inputs) for batch in batches)
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: X,
        lambda: (X, Y),
        lambda: (X, Y, Y),
        lambda: {"x": X},
        lambda: dataset(X),
        lambda: dataset(X, Y),
        lambda: Batches([X[:5], X[5:]]),
        lambda: Batches([(X[:5], Y[:5]), (X[5:], Y[5:])]),
        lambda: (X[i : i + 3] for i in range(0, 10, 3)),
        lambda: ((X[i : i + 3], Y[i : i + 3]) for i in range(0, 10, 3)),
        lambda: [({"x": X}, Y)],
    ],
)
def test_one_input(make):
    (x,) = read(make())
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [X, Z],
        lambda: ([X, Z], Y),
        lambda: {"z": Z, "x": X},
        lambda: ({"z": Z, "x": X, "unused": Y}, Y),
        lambda: dataset({"z": Z, "x": X}),
        lambda: dataset((X, Z), Y),
        lambda: Batches([((X, Z), Y)]),
        lambda: iter([(X, Z)]),
        lambda: iter([([X, Z],)]),
    ],
)
def test_two_inputs(make):
    x, z = read(make(), TWO)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(z, Z)


def test_no_more_than_needed_is_read():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield X[:3]

    (x,) = read(endless(), samples=7)
    assert len(taken) == 3 and len(x) == 9


def test_an_endless_dataset():
    (x,) = read(Endless(), samples=5)
    np.testing.assert_array_equal(x, np.concatenate([X[:2], X[:2] + 1, X[:2] + 2]))


NOTHING = [[], iter(()), np.zeros((0, 5)), Batches([])]


@pytest.mark.parametrize("data", NOTHING, ids=lambda data: type(data).__name__)
def test_no_samples(data):
    with pytest.raises(ValueError, match="at least one sample"):
        read(data)


@pytest.mark.parametrize("data", [5, "images", None], ids=repr)
def test_not_data(data):
    with pytest.raises(ValueError, match=f"Expected calibration data.*data={data!r}"):
        read(data)


@pytest.mark.parametrize("data", [X[:, :4], X[None], np.zeros(10), iter([np.float32(1.0)])])
def test_wrong_shape(data):
    with pytest.raises(ValueError, match=re.escape("input 'x'. Expected shape (None, 5)")):
        read(data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_must_be_finite(value):
    bad = X.copy()
    bad[7, 2] = value
    with pytest.raises(ValueError, match="batch 1 holds NaN or infinite"):
        read(bad)


def test_missing_input():
    with pytest.raises(ValueError, match="inputs .'x', 'z'.*missing .'z'"):
        read({"x": X}, TWO)


def test_wrong_number_of_arrays():
    with pytest.raises(ValueError, match="2 input.*Received: 3 array"):
        read([[X, Z, Z]], TWO)


def test_inputs_must_have_one_length():
    with pytest.raises(ValueError, match="samples"):
        read(iter([[X, Z[:4]]]), TWO)


LABELS = np.arange(10, dtype="float32")[:, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X, LABELS),
        lambda: ({"x": X}, LABELS),
        lambda: dataset(X, LABELS),
        lambda: Batches([(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]),
        lambda: ((X[i : i + 3], LABELS[i : i + 3], None) for i in range(0, 10, 3)),
    ],
)
def test_labelled_batches(make):
    batches = labelled_batches(make(), ONE, limit=9, batch_size=4)
    assert all(isinstance(y, np.ndarray) and w is None for _, y, w in batches)
    np.testing.assert_array_equal(np.concatenate([x for (x,), _, _ in batches]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in batches]), LABELS)


def test_structured_targets_and_sample_weights():
    data = ([X, Z], {"b": LABELS, "a": [Z]}, {"b": Y[:, 0], "a": [LABELS[:, 0]]})
    batches = labelled_batches(data, TWO, limit=2, batch_size=4)
    assert len(batches) == 2
    (x, z), targets, weights = batches[1]
    np.testing.assert_array_equal(x, X[4:8])
    np.testing.assert_array_equal(z, Z[4:8])
    np.testing.assert_array_equal(targets["b"], LABELS[4:8])
    np.testing.assert_array_equal(targets["a"][0], Z[4:8])
    np.testing.assert_array_equal(weights["a"][0], LABELS[4:8, 0])


@pytest.mark.parametrize(
    ("data", "inputs"),
    [
        (X, ONE),
        ([(X, None)], ONE),
        ({"x": X}, ONE),
        ([(X,)], ONE),
        ([X, Z], TWO),
        ([(X, Z)], TWO),
    ],
)
def test_batches_without_labels(data, inputs):
    with pytest.raises(ValueError, match="Expected labelled data.*batch 0 is a .* without targets"):
        labelled_batches(data, inputs, limit=2)


def test_labelled_batches_are_checked():
    with pytest.raises(ValueError, match=re.escape("input 'x'. Expected shape (None, 5)")):
        labelled_batches((X[:, :4], LABELS), ONE, limit=2)
    with pytest.raises(ValueError, match="labelled data with at least one batch"):
        labelled_batches([], ONE, limit=2)
