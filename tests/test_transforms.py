"""Contracts over every registered transform, and the base class itself."""

import keras
import numpy as np
import pytest
from backend_helpers import numpy

import keras_compress.weight_masks  # noqa: F401  (its classes register themselves)
from keras_compress.transforms import TRANSFORMS, Transform


class Halve(Transform):
    def call(self, inputs, training=None):
        return inputs / 2


def test_subclasses_register_themselves_unless_abstract():
    class Base(Transform, abstract=True):
        pass

    assert TRANSFORMS["Halve"] is Halve
    assert "Base" not in TRANSFORMS
    assert keras.saving.get_registered_name(Halve) == "keras_compress>Halve"
    assert keras.saving.get_registered_name(Base) == "Base"


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_computes_in_float32_under_every_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        transform = Halve()
        outputs = transform(keras.ops.ones((2, 3)))
    finally:
        keras.config.set_dtype_policy(before)
    assert transform.compute_dtype == transform.variable_dtype == "float32"
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="computes in float32.*Received: dtype='bfloat16'"):
        Halve(dtype="bfloat16")


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_symbolic_call_keeps_the_shape_and_configuration_round_trips(name):
    transform = TRANSFORMS[name](name="one")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(transform))
    assert type(twin) is type(transform)
    assert twin.get_config() == transform.get_config()
    outputs = transform(keras.KerasTensor((None, 4, 3), dtype="float32"))
    assert outputs.shape == (None, 4, 3) and outputs.dtype == "float32"
    assert transform.compute_output_shape((None, 4, 3)) == (None, 4, 3)


def test_masks_pass_through():
    embedding = keras.layers.Embedding(5, 2, mask_zero=True)
    inputs = keras.Input((3,), dtype="int32")
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(Halve()(embedding(inputs))))
    first = numpy(model(np.array([[1, 2, 0]])))
    np.testing.assert_allclose(first, numpy(model(np.array([[2, 1, 0]]))), rtol=1e-6)
    table = numpy(embedding.embeddings)
    np.testing.assert_allclose(first, (table[1:2] + table[2:3]) / 4, rtol=1e-6)
