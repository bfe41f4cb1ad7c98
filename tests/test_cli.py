"""The command line: what each command prints, and that errors are one line and exit code 2."""

import json
import os
import subprocess
import sys

import keras
import pytest
from keras import layers
from typer.testing import CliRunner

import keras_compress as kc
from keras_compress import cli

CONFIG = '{"compression": {"algorithm": "quantization"}} // comments are allowed'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `float.keras`, `config.json` and `float.xml`."""
    folder = tmp_path_factory.mktemp("cli")
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    outputs = layers.Dense(3, name="dense")(layers.Flatten()(x))
    model = keras.Model(inputs, outputs, name="tiny")
    model.save(folder / "float.keras")
    kc.export(model, folder / "float.xml", verify=False)
    (folder / "config.json").write_text(CONFIG)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result):
    """Return the error message of a failed command: exit code 2, one line, on stderr alone."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("keras-compress: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("command", ["plan", "export", "report", "benchmark", "demo"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"keras-compress {command}" in result.stdout
    assert "Example" in result.stdout


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("plan", "export", "report", "benchmark", "demo"):
        assert f" {name} " in result.stdout


def test_plan(folder):
    result = run("plan", folder / "float.keras", folder / "config.json")
    assert result.exit_code == 0
    assert (
        result.stdout.strip()
        == str(
            kc.plan(keras.models.load_model(folder / "float.keras"), folder / "config.json")
        ).strip()
    )


def test_plan_draws_the_best_widths(folder, tmp_path):
    pytest.importorskip("matplotlib")
    model = keras.models.load_model(folder / "float.keras")
    kernels = {f"{layer.name}/kernel": 1.0 for layer in model.layers if hasattr(layer, "kernel")}
    (tmp_path / "traces.json").write_text(json.dumps(kernels))
    precision = {"type": "hawq", "traces_per_layer_path": str(tmp_path / "traces.json")}
    precision["budget"] = {"bytes": 10**6}
    algorithm = {"algorithm": "quantization", "initializer": {"precision": precision}}
    (tmp_path / "config.json").write_text(json.dumps({"compression": algorithm}))
    arguments = ("plan", folder / "float.keras", tmp_path / "config.json")
    result = run(*arguments, "--pareto", tmp_path / "figure.svg")
    assert result.exit_code == 0 and "Precision" in result.stdout
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    plain = run("plan", folder / "float.keras", folder / "config.json", "--pareto", "figure.svg")
    assert plain.exit_code == 2 and "a search for widths" in plain.stderr


def test_report(folder):
    result = run("report", folder / "float.keras")
    assert result.exit_code == 0
    assert "conv" in result.stdout
    assert f"{3 * 3 * 2 * 4 + 4:,}" in result.stdout


def test_report_of_a_compressed_model(folder, tmp_path):
    model = keras.models.load_model(folder / "float.keras")
    data = keras.random.normal((4, 6, 6, 2))
    kc.compress_model(model, folder / "config.json", data=data, verbose=False).save(
        tmp_path / "int8.keras"
    )
    assert "IR bytes" in run("report", tmp_path / "int8.keras").stdout


def test_report_as_a_page_beside_the_float_model(folder, tmp_path):
    model = keras.models.load_model(folder / "float.keras")
    data = keras.random.normal((4, 6, 6, 2))
    small = kc.compress_model(model, folder / "config.json", data=data, verbose=False)
    small.save(tmp_path / "int8.keras")
    page = tmp_path / "report.html"
    original = folder / "float.keras"
    result = run("report", tmp_path / "int8.keras", "--html", page, "--original", original)
    assert result.exit_code == 0 and "Figures" in result.stdout
    expected = kc.report(small, original=model)
    assert f"{expected.figures[1].bytes:,}" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and f"{4 * model.count_params():,}" in text


def test_report_with_latency(folder):
    result = run("report", folder / "float.keras", "--latency")
    assert result.exit_code == 0 and "ms per call" in result.stdout


def test_report_checks_paths_before_it_loads(folder, tmp_path):
    missing = tmp_path / "none.keras"
    for options, message in (
        (("--html", "report.pdf"), "ends in .html"),
        (("--html", tmp_path / "none" / "report.html"), "existing folder"),
        (("--original", missing), "does not exist"),
    ):
        assert message in one_line(run("report", folder / "float.keras", *options))
    assert "ends in .html" in one_line(run("report", missing, "--html", "report.pdf"))


def test_export_writes_and_verifies(folder, tmp_path):
    out = tmp_path / "model.xml"
    result = run("export", folder / "float.keras", out)
    assert result.exit_code == 0
    assert "weighted operations" in result.stdout
    assert out.exists() and out.with_suffix(".bin").exists()


def test_export_without_verification(folder, tmp_path):
    result = run("export", folder / "float.keras", tmp_path / "model.xml", "--no-verify")
    assert (result.exit_code, result.stdout) == (0, "")


def test_benchmark_shows_models_side_by_side(folder):
    ir = folder / "float.xml"
    result = run("benchmark", ir, ir, "--calls", 3, "--warm-up", 1, "--threads", 1)
    assert result.exit_code == 0
    assert "3 calls each" in result.stdout and "median" in result.stdout


def test_missing_files_are_named(folder, tmp_path):
    missing = tmp_path / "none.keras"
    for arguments in (
        ("report", missing),
        ("export", missing, tmp_path / "model.xml"),
        ("plan", missing, folder / "config.json"),
        ("plan", folder / "float.keras", tmp_path / "none.json"),
        ("benchmark", tmp_path / "none.xml"),
    ):
        assert "does not exist" in one_line(run(*arguments))


def test_errors_of_the_library_are_one_line(folder, tmp_path):
    config = tmp_path / "wrong.json"
    config.write_text('{"compression": {"algorithm": "quantization", "wieghts": {}, "presett": 1}}')
    message = one_line(run("plan", folder / "float.keras", config))
    assert "wieghts" in message and "presett" in message
    assert "suffix" in one_line(run("export", folder / "float.keras", tmp_path / "model.tflite"))
    broken = tmp_path / "broken.keras"
    broken.write_text("no archive")
    one_line(run("report", broken))
    no_model = tmp_path / "broken.xml"
    no_model.write_text("no model")
    one_line(run("benchmark", no_model))


def test_unsafe_models_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: 2 * x)])
    model.save(tmp_path / "unsafe.keras")
    assert "Lambda" in one_line(run("report", tmp_path / "unsafe.keras"))


def test_long_messages_are_cut(monkeypatch, folder):
    def fail(*arguments):
        raise TypeError("too long " * 1000)

    monkeypatch.setattr(kc, "plan", fail)
    message = one_line(run("plan", folder / "float.keras", folder / "config.json"))
    assert len(message) < cli.LONGEST_MESSAGE + 40
    assert message.endswith("...\n")


@pytest.mark.parametrize("problems, code", [([], 0), (["one thing is wrong"], 1)])
def test_demo_says_what_is_wrong(monkeypatch, tmp_path, problems, code):
    import keras_compress.demo

    seen = []

    def pretend(*arguments):
        seen.append(arguments)
        return problems

    monkeypatch.setattr(keras_compress.demo, "run_demo", pretend)
    result = run("demo", "--out", tmp_path, "--epochs", 2)
    assert result.exit_code == code
    assert seen == [(tmp_path, 2, 3)]
    assert result.stderr == "".join(f"keras-compress: {problem}\n" for problem in problems)


def test_as_a_program(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "keras_compress.cli", "report", str(tmp_path / "none.keras")],
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("keras-compress: Expected a `.keras` file.")
