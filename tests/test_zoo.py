"""Every architecture of the coverage page through the whole way; `make test-all` runs it."""

import importlib.util
import math

import pytest
from backend_helpers import BACKEND, benchmark_module

sweep, zoo = benchmark_module("sweep"), benchmark_module("zoo")
CONVOLUTIONAL = zoo.APPLICATIONS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_architecture(name):
    if BACKEND != "tensorflow":
        pytest.skip("the sweep runs on TensorFlow")
    for module in ("nncf", *(["keras_hub"] if name not in CONVOLUTIONAL else [])):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    row = sweep.measure_in_child(name)
    assert not row.error, row.error
    assert row.trace <= 1e-6
    assert math.isfinite(row.loss)
    assert row.save == row.strip == 0.0
    # keras-hub calls TensorFlow directly in a layer or two, which then stay whole.
    if not any("cannot be traced" in reason for reason in row.untouched):
        # In NNCF's ConvNeXt the CPU plugin computes every first product of a block twice.
        assert row.layers[0] == row.layers[1] or row.layers[0] >= row.nncf_layers[0]
        assert row.share >= (0.99 if name in CONVOLUTIONAL else 0.95)
    # With random weights single roundings grow from layer to layer, as a change by a millionth does
    # unless it meets no tie: the transformers are shallow.
    assert row.ir <= max(2e-3 if name in CONVOLUTIONAL else 3e-2, 3 * row.moved)
