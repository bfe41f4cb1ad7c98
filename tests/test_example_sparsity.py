"""The examples of sparsity: their commands run to the end, their figures are those of the files."""

import importlib
import re

import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke, save_small_network, write_cifar10

import keras_compress as kc

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="one run of the examples shows what they show"
)


@pytest.fixture(scope="module")
def modules():
    names = ("sparsity_variants", "digits_sparsity", "cifar10_sparsity")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield [importlib.import_module(name) for name in names]


def test_levels_and_freezing_come_in_time(modules):
    for name, algorithm in modules[0].sparsities(12).items():
        if algorithm:
            (made,) = kc.Config.load({"compression": algorithm}).algorithms
            level = 0.5 if name == "2:4" else 0.8
            assert made.schedule(6) == pytest.approx(level) and made.schedule(0) < level
            assert made.params.sparsity_freeze_epoch == 9


def test_digits(modules, tmp_path, monkeypatch):
    variants, digits, _ = modules
    kinds = {kind: variants.sparsities(4)[kind] for kind in ("dense", "magnitude 80 %")}
    monkeypatch.setattr(variants, "sparsities", lambda epochs: kinds)
    monkeypatch.setattr(digits, "PRETRAINING", 1)
    few = [(images[:96], classes[:96]) for images, classes in digits.load_digits()]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    result = invoke(digits.main, ["--epochs", 4, "--out", tmp_path], monkeypatch)
    assert result.exit_code == 0, result.output
    rows = [cells(result.output, f"{kind}{end}") for kind in kinds for end in ("", ", int8")]
    assert [row[1] for row in rows] == ["", "", "80.00%", "80.00%"]
    assert rows[0][2] == "0.00%" and rows[2][2] == "80.00%"
    for index, row in enumerate(rows):
        assert re.fullmatch(r"\d+\.\d\d%", row[0])
        size = (tmp_path / f"sparsity_{index}.bin").stat().st_size
        assert row[3] == f"{size:,}"
    zipped = [int(row[4].replace(",", "")) for row in rows]
    assert zipped[3] < zipped[1] < zipped[0] and zipped[2] < 0.4 * zipped[0]


def test_cifar10_starts_every_variant_from_the_checkpoint(modules, tmp_path, monkeypatch):
    variants, _, cifar10 = modules
    kinds = {"2:4": variants.sparsities(4)["2:4"]}
    monkeypatch.setattr(variants, "sparsities", lambda epochs: kinds)
    monkeypatch.setattr(variants, "INT8", {"algorithm": "const_sparsity"})
    write_cifar10(tmp_path, test=500)
    save_small_network(tmp_path / "small.keras")
    options = {"data": tmp_path, "checkpoint": tmp_path / "small.keras", "work": tmp_path / "out"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = invoke(cifar10.main, [*arguments, "--epochs", 4, "--steps", 2], monkeypatch)
    assert result.exit_code == 0, result.output
    # The first convolution has 3 inputs, of which 2 stay: 72 of its 216 weights go.
    expected = f"{(72 + 288 + 40) / (216 + 576 + 80):.2%}"
    assert cells(result.output, "2:4")[1:3] == [expected, expected]


def test_missing_data_is_an_error_of_the_command_line(modules, tmp_path, monkeypatch):
    result = invoke(modules[2].main, ["--data", tmp_path], monkeypatch)
    assert result.exit_code == 2 and "data_batch_1.bin" in result.output
    missing = ["--data", tmp_path, "--checkpoint", tmp_path / "no.keras"]
    result = invoke(modules[2].main, missing, monkeypatch)
    assert result.exit_code == 2 and "no.keras" in result.output
