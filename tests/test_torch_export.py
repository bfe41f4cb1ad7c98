"""Torch modules as OpenVINO IR and ONNX."""

import importlib.util

import numpy as np
import onnx
import pytest
from backend_helpers import BACKEND
from example_helpers import EXAMPLES, cells, invoke

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch
from torch_training import (
    LOW_BITS,
    PRUNING,
    QUANTIZATION,
    images,
    in_evaluation,
    network,
    trained,
)

import keras_compress.torch as kct


@pytest.fixture
def module():
    return network()


@pytest.mark.parametrize("algorithms", [(QUANTIZATION,), (LOW_BITS,), (PRUNING, QUANTIZATION)])
def test_exported_ir_is_the_module_in_eight_bits(module, algorithms, tmp_path):
    module, _ = trained(module, *algorithms)
    report = kct.export(module, tmp_path / "model.xml")
    assert report.relative <= 1e-3
    assert report.eight_bit_layers == len(report.layers) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.bin",
        "model.verify.json",
        "model.xml",
    ]


def test_exported_shrunk_module(module, tmp_path):
    module, _ = trained(module, PRUNING, QUANTIZATION)
    report = kct.export(kct.shrink(module), tmp_path / "small.xml")
    assert report.relative <= 1e-3 and report.eight_bit_layers == len(report.layers)
    whole = kct.export(module, tmp_path / "whole.xml", images(2))
    assert report.stored_bytes < whole.stored_bytes


def test_exported_onnx(module, tmp_path):
    module, _ = trained(module, QUANTIZATION)
    report = kct.export(module, tmp_path / "model.onnx")
    assert report.relative <= 1e-3
    assert [layer.eight_bit for layer in report.layers] == [True] * 5
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    weights = [each for each in tensors if len(each.dims) >= 2 and max(each.dims[1:]) > 1]
    assert len(weights) == 5 and {w.data_type for w in weights} == {onnx.TensorProto.INT8}


def test_plain_module_is_exported_too(module, tmp_path):
    import openvino as ov

    assert kct.export(module.train(), tmp_path / "float.xml", images()) is None
    assert module.training
    run = ov.Core().compile_model(
        tmp_path / "float.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    result = run(images(7).numpy())[0]
    assert np.abs(result - in_evaluation(module, images(7)).numpy()).max() <= 1e-5


def test_nothing_is_written_where_an_export_fails(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("odd")

    with pytest.raises(Exception, match="odd"):
        kct.export(Odd(), tmp_path / "odd.xml", images())
    assert not list(tmp_path.iterdir())


def test_example(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("torch_digits", EXAMPLES / "torch_digits.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "FLOAT_EPOCHS", 2)
    result = invoke(example.main, ["--epochs", 1, "--out", tmp_path], monkeypatch)
    assert result.exit_code == 0, result.exception
    assert cells(result.output, "int8")[3] == "4 of 4"
    assert float(cells(result.output, "int8")[1].rstrip("%")) > 50
    assert (tmp_path / "torch_pruned_int8.xml").exists()
