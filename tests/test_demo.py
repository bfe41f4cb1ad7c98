"""The demo: a short run keeps its promises, and a promise that is not kept is said."""

import io

import numpy as np
import pytest
from rich.console import Console

from keras_compress.demo import _problems, digits_network, load_digits, run_demo
from keras_compress.export import VerifyReport
from keras_compress.export.precisions import LayerPrecision


def test_short_demo_keeps_its_promises(tmp_path):
    text = io.StringIO()
    out = tmp_path / "results"
    problems = run_demo(out, epochs=4, fine_tuning=1, console=Console(file=text, width=100))
    assert problems == []
    names = {path.name for path in out.iterdir()}
    assert names >= {"float.xml", "float.bin", "int8.xml", "int8.bin", "int8.keras"}
    for size in ((out / name).stat().st_size for name in ("float.bin", "int8.bin")):
        assert f"{size:,}" in text.getvalue()
    for word in ("accuracy", "latency", "5 of 5", "seconds: fine-tune", "seconds: all stages"):
        assert word in text.getvalue()


def test_digits_are_split_once():
    parts = load_digits()
    images = np.concatenate([part[0] for part in parts])
    assert [len(part[1]) for part in parts] == [1200, 150, 447]
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 1)
    assert all(set(part[1]) == set(range(10)) for part in parts)


def test_network_has_normalization_and_a_residual_add():
    kinds = [type(layer).__name__ for layer in digits_network().layers]
    assert kinds.count("Conv2D") == kinds.count("BatchNormalization") == 4
    assert kinds.count("Add") == 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({}, None),
        ({"same": 99}, "agree on 99 of 100 images"),
        ({"int8": 0.974}, "loses 0.60% accuracy"),
        ({"bytes": 31}, r"0.310 of the float one"),
        ({"precision": "f32"}, "0 of 1 layers run in 8 bits"),
    ],
)
def test_a_broken_promise_is_one_sentence(change, sentence):
    case = {"same": 100, "int8": 0.98, "bytes": 30, "precision": "u8"} | change
    report = VerifyReport(
        path="int8.xml",
        samples=100,
        outputs=(),
        layers=(LayerPrecision("conv", "Convolution", case["precision"]),),
        device="CPU",
    )
    accuracy = {"float": 0.98, "IR int8": case["int8"]}
    problems = _problems(accuracy, [(1, 100), (1, case["bytes"])], report, case["same"], 100)
    assert len(problems) == (sentence is not None)
    assert all(sentence in problem for problem in problems)
