"""A model goes from one backend to another: loaded, trained on, exported, brought back.

The other backend runs in a process of its own, on the models that this one saves.
"""

import importlib.util
import json
import zipfile

import across_backends
import keras
import numpy as np
import openvino as ov
import pytest
from across_backends import ALGORITHMS, BATCH, CONTINUED, EPOCHS, FORMATS, SAVED_AFTER
from backend_helpers import BACKEND

from keras_compress.export.verify import compile_on_cpu

STEPS = len(across_backends.data()[0]) // BATCH  # in an epoch


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """{case: (folder with the saved model, its arrays then, its arrays later, what was logged)}."""
    made = {}
    for case, algorithms in ALGORITHMS.items():
        folder = tmp_path_factory.mktemp(case)
        made[case] = folder, *across_backends.go_on(across_backends.trained(algorithms, folder))
    return made


@pytest.fixture(scope="module", params=sorted({"tensorflow", "jax", "torch"} - {BACKEND}))
def there(request, here):
    """The same of another backend, which went on with the saved models."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: `pip install {request.param}`")
    across_backends.in_process_of(request.param, "go_on", [folder for folder, *_ in here.values()])
    made = {}
    for case, (folder, *_) in here.items():
        made[case] = folder = folder / request.param
        arrays = (dict(np.load(folder / name)) for name in ("before.npz", "after.npz"))
        made[case] = folder, *arrays, json.loads((folder / "told.json").read_text())
    return made


def assert_same_state(actual, expected):
    """Weights, masks, parameters of ranges and the optimizer are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name in actual.keys() - {"outputs"}:
        # XLA divides by a constant as a product with its inverse: ends of grids are off by a bit.
        tolerance = 3e-7 if name.startswith("range") else 0
        np.testing.assert_allclose(actual[name], expected[name], tolerance, err_msg=name)


def assert_same_outputs(actual, expected):
    """Outputs differ by the noise of float32, which moves a value midway between two levels.

    An array of 32 samples has some 20 000 values that are rounded to one of 256 levels; one of
    them may be within that noise of the middle, and its sample is then off by part of a level.
    """
    difference = np.abs(actual - expected).max(axis=-1) / np.ptp(expected)
    assert np.quantile(difference, 0.9) < 1e-5
    assert difference.max() < 0.02


@pytest.mark.parametrize("case", ALGORITHMS)
def test_loaded_elsewhere_it_is_the_same_model(case, here, there):
    _, expected, _, _ = here[case]
    _, actual, _, _ = there[case]
    assert_same_state(actual, expected)
    assert_same_outputs(actual["outputs"], expected["outputs"])


@pytest.mark.parametrize("case", ALGORITHMS)
def test_training_goes_on_where_it_was(case, here, there):
    *_, expected = here[case]
    *_, actual = there[case]
    assert actual["steps"] == expected["steps"] == EPOCHS * STEPS
    assert actual["progress"]["epoch"] == EPOCHS - 1
    assert actual["progress"] == expected["progress"]
    assert actual["history"].keys() == expected["history"].keys()
    for key, values in expected["history"].items():
        assert len(values) == EPOCHS - SAVED_AFTER
        exact = "/level/" in key or (case != "drawn" and key.endswith(("_level", "sparsity")))
        np.testing.assert_allclose(actual["history"][key], values, 1e-7 if exact else 0.05)


@pytest.mark.parametrize("case", ALGORITHMS)
def test_it_comes_back(case, there):
    folder, _, expected, _ = there[case]
    actual = across_backends.arrays_of(keras.models.load_model(folder / CONTINUED))
    assert_same_state(actual, expected)
    assert_same_outputs(actual["outputs"], expected["outputs"])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_file_names_optimizers_as_every_backend_does(scaled, tmp_path):
    optimizer = keras.optimizers.AdamW(0.5)
    model = across_backends.compressed(ALGORITHMS["masked"])
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        saved = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
    inner = saved["config"]["inner_optimizer"] if scaled else saved
    assert saved["module"] == inner["module"] == "keras.optimizers"
    assert inner["class_name"] == "AdamW" and inner["config"]["learning_rate"] == 0.5
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert type(getattr(loaded, "inner_optimizer", loaded)) is type(optimizer)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="other backends' exports are compared with its")
def test_exports_are_those_of_tensorflow(here):
    """Up to the numbers that a file gives, it is the same: here a child process writes it."""
    folder, arrays, *_ = here["masked"]
    across_backends.export(folder)
    across_backends.in_process_of("tensorflow", "export", [folder])
    for suffix in FORMATS:
        paths = (folder / f"exported-{name}/model{suffix}" for name in (BACKEND, "tensorflow"))
        x = across_backends.data()[0]
        actual, expected = (compile_on_cpu(ov.Core(), path)(x)[0] for path in paths)
        # Weights are rounded here: XLA divides by a constant as a product with its inverse.
        assert np.abs(actual - expected).max() <= 1e-6 * np.ptp(expected), suffix
        assert_same_outputs(actual, arrays["outputs"])
