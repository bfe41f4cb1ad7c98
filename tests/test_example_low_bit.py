"""The example of fewer bits: its configurations say what its rows are, its command runs."""

import importlib
import json

import keras
import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke, save_small_network, write_cifar10

import keras_compress as kc

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="one run of the examples shows what they show"
)


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("cifar10_low_bit")


def test_rows_have_the_widths_of_their_names(example):
    model = keras.models.load_model(example.CHECKPOINT, compile=False)
    variants = example.variants(8)
    assert list(variants)[:2] == ["float", "W8A8"] and variants["float"] is None
    for name, weights, activations in (("W4A4", 4, 4), ("W4A8", 4, 8), ("W2A8", 2, 8)):
        decided = kc.plan(model, variants[name])
        texts = {entry.layer: entry.description.split()[0] for entry in decided.weights}
        assert texts.pop("stem_conv") == texts.pop("logits") == "8"
        assert set(texts.values()) == {str(weights)}
        edges = {entry.name: entry.description.split()[0] for entry in decided.edges}
        eight = [edges.pop(f"{name}-fake_quantize") for name in ("image", "pool")]
        assert eight == ["8", "8"] and set(edges.values()) == {str(activations)}
    for name in ("xnor", "dorefa"):
        params = kc.Config.load(variants[name]).algorithms[0].params
        assert (params.start_epoch("activations"), params.start_epoch("weights")) == (0, 2)


def test_the_command(example, tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    save_small_network(tmp_path / "small.keras")
    made = example.variants(4)
    names = ["float", "W8A8", "mixed 4/8, 1.5x", "xnor"]
    # Of so small a network the first layer, whose input keeps 8 bits, does most of the work.
    precision = made["mixed 4/8, 1.5x"]["compression"][0]["initializer"]["precision"]
    precision |= {"iter_number": 2, "compression_ratio": 1.2}
    monkeypatch.setattr(example, "variants", lambda epochs: {name: made[name] for name in names})
    options = {"data": tmp_path, "checkpoint": tmp_path / "small.keras", "work": tmp_path / "out"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments += ["--epochs", 4, "--steps", 2]
    result = invoke(example.main, arguments, monkeypatch)
    assert result.exit_code == 0, result.output
    rows = {name: cells(result.output, name) for name in names}
    assert [rows[name][6] for name in names] == ["0 of 3", "3 of 3", "3 of 3", "3 of 3"]
    assert rows["W8A8"][4] == "1.00" and float(rows["xnor"][4]) < 1
    for name, row in rows.items():
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        assert row[3] == f"{(tmp_path / 'out' / f'{plain}.bin').stat().st_size:,}"

    def fail(*args):
        raise AssertionError("a finished row must not be trained again")

    monkeypatch.setattr(example.Training, "run", fail)
    again = invoke(example.main, arguments, monkeypatch)
    assert again.exit_code == 0 and cells(again.output, "xnor")[:5] == rows["xnor"][:5]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: each["trained"] for name, each in stored.items()} == dict.fromkeys(names, 8)


def test_missing_data_is_an_error_of_the_command_line(example, tmp_path, monkeypatch):
    result = invoke(example.main, ["--data", tmp_path], monkeypatch)
    assert result.exit_code == 2 and "data_batch_1.bin" in result.output
