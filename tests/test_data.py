"""Whatever `fit` accepts becomes batches of model inputs."""

import re

import keras
import numpy as np
import pytest

from keras_compress.data import input_batches

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


@pytest.mark.parametrize("data", [[], iter(()), np.zeros((0, 5)), Batches([])], ids=repr)
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
