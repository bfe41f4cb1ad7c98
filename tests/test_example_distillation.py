"""The example of distillation: its rows differ by the teacher alone, its commands run."""

import importlib
import json

import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke, save_small_network, write_cifar10

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="one run of the examples shows what they show"
)


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("distillation")


def test_rows_differ_by_their_teacher_alone(example, monkeypatch):
    configs = []

    class Task:
        model = calibration = None

        def fit(self, model):
            pass

        def accuracy(self, model):
            return 0.5

    monkeypatch.setattr(
        example.kc,
        "compress_model",
        lambda model, config, **_: configs.append(config["compression"]),
    )
    for teacher in example.TEACHERS.values():
        example.trained_accuracy(Task(), example.ALGORITHMS["4 bits"], teacher, 0)
    alone, outputs, features = configs
    assert alone == [example.ALGORITHMS["4 bits"]]
    assert outputs[0] == features[0] == alone[0]
    assert outputs[1]["algorithm"] == "knowledge_distillation" and "features" not in outputs[1]
    assert features[1] == outputs[1] | {"features": {"target_scopes": ["{re}re_?lu"]}}


@pytest.fixture
def small(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "CHECKPOINT", tmp_path / "small.keras")
    monkeypatch.setattr(example, "PRETRAINING", 1)
    without_features = {way: example.TEACHERS[way] for way in ("alone", "outputs")}
    monkeypatch.setattr(example, "TEACHERS", without_features)
    write_cifar10(tmp_path)
    save_small_network(tmp_path / "small.keras")
    return tmp_path


def keep(example, monkeypatch, name):
    monkeypatch.setattr(example, "ALGORITHMS", {name: example.ALGORITHMS[name]})


def test_the_command_on_cifar10_goes_on_where_it_was(example, small, monkeypatch):
    keep(example, monkeypatch, "4 bits")
    arguments = ["--data", small, "--epochs", 1, "--steps", 2, "--seeds", 2, "--out", small]
    result = invoke(example.main, arguments, monkeypatch)
    assert result.exit_code == 0, result.output
    file = small / "distillation_cifar10_1.json"
    found = json.loads(file.read_text())
    assert len(found) == 1 + 2 * 2
    assert cells(result.output, "float")[-1] == f"{found['float']:.2%}"
    file.write_text(json.dumps(found | {"4 bits, alone, 0": 0.25, "4 bits, alone, 1": 0.75}))
    again = invoke(example.main, arguments, monkeypatch)
    assert cells(again.output, "4 bits: labels") == ["25.00%", "75.00%", "50.00%"]
    assert "Epoch" not in again.output


def test_the_command_on_digits(example, small, monkeypatch):
    keep(example, monkeypatch, "60 % pruned")
    arguments = ["--epochs", 1, "--seeds", 1, "--out", small]
    result = invoke(example.main, arguments, monkeypatch)
    assert result.exit_code == 0, result.output
    found = json.loads((small / "distillation_digits_1.json").read_text())
    assert cells(result.output, "60 % pruned: labels")[0] == f"{found['60 % pruned, alone, 0']:.2%}"
