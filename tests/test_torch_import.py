"""`import keras_compress.torch` selects Keras' torch backend, or says what is in the way."""

import importlib.util
import os
import subprocess
import sys

import pytest

has_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed here"
)
BACKEND = "; import keras; print('backend', keras.backend.backend())"
NO_TORCH = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "torch" else find_spec(name, *args)
"""


def run(code, backend=None):
    """Run code in a process of its own; returns (exit status, last line that it wrote)."""
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1]


@has_torch
@pytest.mark.parametrize(
    "statement",
    [
        "import keras_compress.torch as kct; kct.compress_model",
        "import importlib; importlib.import_module('keras_compress.torch')",
    ],
)
def test_a_fresh_process_gets_the_torch_backend(statement):
    assert run(statement + BACKEND) == (0, "backend torch")


@has_torch
def test_it_takes_part_in_keras_on_torch():
    code = "import keras, keras_compress, keras_compress.torch" + BACKEND
    assert run(code, "torch") == (0, "backend torch")


@has_torch
def test_other_imports_choose_nothing():
    # The default of Keras, or what its configuration file says.
    assert run("import keras_compress.callbacks" + BACKEND) == run("pass" + BACKEND)


@has_torch
@pytest.mark.parametrize("code", ["", "import keras; "])
def test_another_backend_is_an_error_that_says_what_to_set(code):
    status, line = run(code + "import keras_compress.torch", "tensorflow")
    assert status == 1
    assert line.startswith("ImportError: Expected Keras on its torch backend")
    assert "Received: backend 'tensorflow'" in line and "KERAS_BACKEND=torch" in line


def test_without_torch_one_error_says_what_to_install():
    status, line = run(NO_TORCH + "import keras_compress.torch", "tensorflow")
    assert status == 1
    assert line.startswith("ImportError: Expected torch beside keras_compress.torch")
    assert "pip install" in line
