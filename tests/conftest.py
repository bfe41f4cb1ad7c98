"""Quiet backends and one seed for every test."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import awkward_models  # noqa: F401  (adds its models to the collection)
import keras
import masked_models  # noqa: F401
import pytest


@pytest.fixture(autouse=True)
def fresh_keras():
    """Start each test from one seed, fresh layer names and the float32 policy."""
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
