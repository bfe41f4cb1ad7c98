"""The example of accuracy-aware training: its command runs to the end, and goes on where it was."""

import importlib
import json

import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="one run of the example shows what it shows"
)


def test_digits(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: `pip install matplotlib`")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("digits_accuracy_aware")
    monkeypatch.setattr(example, "PRETRAINING", 1)
    few = [(images[:64], classes[:64]) for images, classes in example.split()]
    monkeypatch.setattr(example, "split", lambda: few)
    first = invoke(example.main, ["--epochs", 2, "--out", tmp_path], monkeypatch)
    assert first.exit_code == 0, first.output
    for index, name in enumerate(("float", "pruned to the bound, int8")):
        size = (tmp_path / f"accuracy_aware_{index}.bin").stat().st_size
        assert cells(first.output, name)[2] == f"{size:,}"
    assert (tmp_path / "accuracy_aware.svg").read_text().startswith("<?xml")
    state = json.loads((tmp_path / "accuracy_aware" / "accuracy_aware.json").read_text())
    assert state["record"]["finished"] and len(state["record"]["epochs"]) == 2
