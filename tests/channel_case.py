"""Small models, one per rule of how channels move, with the groups of channels derived by hand.

`CASES` maps a name to a `Case`; the modules `channel_cases_*` fill it. Every head is a `Dense`
named "head", whose three units the model gives out; `expected` is about all other groups.
"""

import dataclasses
from collections.abc import Callable

import keras
import models
import pytest
from backend_helpers import BACKEND
from keras import layers

CASES = {}
GIVEN_OUT = "the model gives it out"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its groups of channels.

    Attributes:
        build: function that makes the model.
        expected: {name of a group and its further layers: size, or (size, why all are kept)}.
        skip: why it cannot run on TensorFlow; empty where it can.
    """

    build: Callable
    expected: dict
    skip: str = ""

    @property
    def prunes(self):
        """Whether any channel can be removed."""
        return any(not isinstance(group, tuple) for group in self.expected.values())


def case(expected, head=True, skip=""):
    def collect(function):
        groups = expected | ({"head": (3, GIVEN_OUT)} if head else {})
        CASES[function.__name__] = Case(function, groups, skip)
        return function

    return collect


def unknown(size, name, kind):
    return size, f"how they move through '{name}' ({kind}) is not known"


def image(channels=3, size=8):
    return keras.Input((size, size, channels), name="image")


def rows(length=6, channels=5):
    return keras.Input((length, channels), name="rows")


def vector(channels=5):
    return keras.Input((channels,), name="vector")


def ids(length=6):
    return keras.Input((length,), dtype="int32", name="ids")


def conv(filters, name, kernel=3, **kwargs):
    return layers.Conv2D(filters, kernel, padding="same", name=name, **kwargs)


def dense(units, name, **kwargs):
    return layers.Dense(units, name=name, **kwargs)


def model(inputs, x):
    """Close a model: the mean over all axes but the last, and the head."""
    pools = {
        3: layers.GlobalAveragePooling1D,
        4: layers.GlobalAveragePooling2D,
        5: layers.GlobalAveragePooling3D,
    }
    if len(x.shape) in pools:
        x = pools[len(x.shape)](name="pool")(x)
    return keras.Model(inputs, dense(3, "head")(x), name="case")


def made(name):
    """Return the model of a case with random weights."""
    case = CASES[name]
    if case.skip and BACKEND == "tensorflow":
        pytest.skip(case.skip)
    return models.randomize(case.build())
