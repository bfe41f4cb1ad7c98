"""How results are shown: once, whatever they are shown in."""

import builtins

import keras
import pytest
from keras import layers

import keras_compress as kc

CONFIG = {"compression": {"algorithm": "quantization"}}


class ZMQInteractiveShell:
    """What rich takes for a notebook."""

    displayed = 0


@pytest.fixture
def notebook(monkeypatch):
    shell = ZMQInteractiveShell()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    display = pytest.importorskip("IPython.display", reason="comes with the notebook's kernel")

    def count(*args, **kwargs):
        shell.displayed += 1

    monkeypatch.setattr(display, "display", count)
    return shell


def results():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")], name="small")
    return [kc.plan(model, CONFIG), kc.report(model)]


@pytest.mark.parametrize("index", [0, 1], ids=["plan", "report"])
def test_a_notebook_shows_a_result_once(notebook, index):
    result = results()[index]
    assert "dense" in result._repr_html_()
    assert "dense" in str(result)
    assert notebook.displayed == 0
