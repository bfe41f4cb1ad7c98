"""Binarized models in reports and files: bits, bytes, and the trained numbers in the IR."""

import keras
import numpy as np
import openvino as ov
import pytest
from backend_helpers import BACKEND, numpy
from binarization_helpers import (
    BINARIZED,
    batch,
    compress,
    config,
    kernels,
    network,
    quantizer_of,
    trained,
)
from keras import layers

import keras_compress as kc
from keras_compress.binary_quantizers import BinaryActivations, TernaryWeights
from keras_compress.export.verify import compile_on_cpu
from keras_compress.layers import FakeQuantize
from keras_compress.quantizers import SymmetricQuantizer

tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="exported by TensorFlow: other backends do it in a child"
)


def test_reports_say_one_bit():
    model = compress()
    for each in (model, kc.strip(model)):
        rows = {layer.layer: layer for layer in kc.report(each).layers}
        assert [(rows[n].weight_bits, rows[n].activation_bits) for n in BINARIZED] == [(1, 1)] * 4
        second = 3 * 3 * 16 * 16 // 8 + 4 * 16
        assert rows["second"].bytes_after == second
        assert rows["first"].weight_bits == rows["first"].activation_bits == 8
    ternary = compress(config(mode="ternary"))
    for each in (ternary, kc.strip(ternary)):
        rows = {layer.layer: layer for layer in kc.report(each).layers}
        assert (rows["second"].weight_bits, rows["second"].activation_bits) == (2, 8)
        assert rows["second"].bytes_after == 3 * 3 * 16 * 16 // 4 + 4 * 16


def test_reports_say_float_before_the_epoch_has_come():
    params = {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 1}
    rows = {layer.layer: layer for layer in kc.report(compress(config(params=params))).layers}
    assert rows["second"].weight_bits is rows["second"].activation_bits is None
    assert rows["second"].bytes_after == rows["second"].bytes_before
    assert rows["first"].weight_bits == 8


def close(model, path, x):
    """Whether an IR gives the trained numbers, up to values here and there at a threshold."""
    compiled = compile_on_cpu(ov.Core(), path)
    received, expected = np.array(compiled(x)[0]), numpy(model(x))
    difference = np.abs(received - expected) / np.ptp(expected)
    return np.median(difference) < 1e-6 and (difference > 0.02).mean() < 0.02


def codes_of(ir):
    """Return {layer: (storage type, values of its kernel)} of the constants of an IR."""
    found = {}
    for op in ir.get_ordered_ops():
        if op.get_friendly_name().endswith("/kernel/dequantized"):
            layer = op.get_friendly_name().split("/")[0]
            inner = ov.Model([ov.opset15.result(op.output(0))], [])
            compiled = ov.Core().compile_model(inner, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found[layer] = np.array(compiled({})[0])
    types = {
        op.get_friendly_name().split("/")[0]: op.get_element_type().get_type_name()
        for op in ir.get_ordered_ops()
        if op.get_friendly_name().endswith("/codes")
    }
    return {layer: (types[layer], values) for layer, values in found.items()}


@tensorflow_only
@pytest.mark.parametrize("mode", ["xnor", "dorefa", "ternary"])
def test_the_ir_runs_in_integers_and_gives_the_trained_numbers(mode, tmp_path):
    model = trained(config(mode=mode))
    path, x = tmp_path / "model.xml", batch(seed=1)[0]
    report = kc.export(model, path, data=x)
    assert report.eight_bit_layers == len(report.layers) == 7
    assert close(model, path, x)
    kc.export(kc.strip(model), tmp_path / "plain.xml", verify=False)
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    for layer, (storage, values) in codes_of(ov.Core().read_model(path)).items():
        kernel = kernels(model)[layer]
        flat = [np.sort(each.ravel()) for each in (values, kernel)]
        np.testing.assert_allclose(*flat, rtol=1e-6)
        if layer in BINARIZED:
            assert storage == ("u2" if mode == "ternary" else "u1")
        else:
            assert storage == "i8"


@tensorflow_only
def test_weights_of_one_bit_take_one_bit(tmp_path):
    binary, eight = trained(epochs=1), compress({"compression": {"algorithm": "quantization"}})
    for name, model in (("binary", binary), ("eight", eight)):
        kc.export(model, tmp_path / f"{name}.xml", verify=False)
    sizes = {n: (tmp_path / f"{n}.bin").stat().st_size for n in ("binary", "eight")}
    parameters = sum(kernels(binary)[name].size for name in BINARIZED)
    saved = sizes["eight"] - sizes["binary"]
    # A few constants of the quantizers differ.
    assert abs(saved - 7 / 8 * parameters) < 300


@tensorflow_only
def test_a_rounded_tensor_becomes_binary_in_one_operation(tmp_path):
    """The residual's tensor has two quantizers: one of 8 bits and, reading that, one of 1 bit."""
    model, x = trained(), batch(seed=1)[0]
    rounded = model.get_layer("first_relu-fake_quantize")
    binary = model.get_layer("first_relu-binarize")
    assert binary.input is rounded.output
    kc.export(model, tmp_path / "model.xml", verify=False)
    ir = ov.Core().read_model(tmp_path / "model.xml")
    joined = [
        op
        for op in ir.get_ordered_ops()
        if op.get_type_name() == "FakeQuantize"
        and op.input_value(0).get_node().get_type_name() == "FakeQuantize"
    ]
    assert len(joined) == 1
    low, high = (float(joined[0].input_value(i).get_node().data.ravel()[0]) for i in (1, 2))
    step, cutoff = float(rounded.quantizer.step()), float(binary.quantizer.cutoff())
    whole = np.floor(cutoff / step)
    np.testing.assert_allclose([low / step, high / step], [whole + 0.25, whole + 0.75], rtol=1e-4)
    assert kc.verify(model, tmp_path / "model.xml", data=x).relative < 1e-5


@tensorflow_only
def test_activations_of_an_ir_are_zero_or_the_scale(tmp_path):
    model, x = trained(), batch(seed=1)[0]
    kc.export(model, tmp_path / "model.xml", verify=False)
    ir = ov.Core().read_model(tmp_path / "model.xml")
    edges = [layer for layer in model.layers if isinstance(layer, FakeQuantize)]
    binary = [layer for layer in edges if isinstance(layer.quantizer, BinaryActivations)]
    scales = sorted(float(layer.quantizer.step()) for layer in binary)
    tops = [
        (float(op.input_value(4).get_node().data.ravel()[0]) / codes, op)
        for op in ir.get_ordered_ops()
        if op.get_type_name() == "FakeQuantize"
        for codes in (1, 255)  # one that was joined has the scale as its highest value
    ]
    chosen = [(top, op) for top, op in tops if np.isclose(top, scales, rtol=1e-5).any()]
    assert len(chosen) == len(binary) == 4
    ir.add_results([ov.opset15.result(op.output(0)) for _, op in chosen])
    compiled = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = list(compiled(x).values())[1:]
    shares = {round(float(layer.quantizer.step()), 4): layer for layer in binary}
    for (scale, _), values in zip(chosen, outputs, strict=True):
        np.testing.assert_allclose(np.unique(values), [0, scale], rtol=1e-5)
        layer = min(shares.values(), key=lambda each: abs(each.quantizer.step() - scale))
        before = numpy(keras.Model(model.input, layer.output)(x))
        assert abs((values > 0).mean() - (before > 0).mean()) < 1e-3


@tensorflow_only
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_a_threshold_is_hit_exactly(scale, share, tmp_path):
    """Values around and at the threshold, read from an input: nothing is summed before."""
    inputs = keras.Input((64,), name="x")
    hidden = layers.Dense(64, use_bias=False, name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(64, use_bias=False, name="out")(hidden))
    settings = config(binarize_first_and_last=True, target_scopes=["hidden"])
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 64)).astype("float32") * np.float32(scale)
    model = compress(settings, x, model)
    edge = model.get_layer("x-binarize").quantizer
    edge.log_scale.assign(np.log(scale))
    edge.threshold.assign(np.log(share / (1 - share)))
    cutoff, step = edge.cutoff(), edge.step()
    near = cutoff + step * np.float32(1e-6) * np.arange(-8, 9, dtype="float32")
    x[0, :17], x[1, :8], x[2, :8] = near, cutoff, 0
    kc.export(model, tmp_path / "model.xml", verify=False)
    ir = ov.Core().read_model(tmp_path / "model.xml")
    (op,) = [
        op
        for op in ir.get_ordered_ops()
        if op.get_type_name() == "FakeQuantize"
        and np.isclose(op.input_value(4).get_node().data.ravel()[0], 255 * step, rtol=1e-5)
    ]
    ir.add_results([ov.opset15.result(op.output(0))])
    compiled = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    received = list(compiled(x).values())[1]
    np.testing.assert_allclose(received, np.where(x > cutoff, step, 0), rtol=1e-5)


@tensorflow_only
@pytest.mark.parametrize("activation", ["swish", "tanh", "relu6", "linear", "leaky_relu"])
def test_any_function_may_stand_before_a_binarizer(activation, tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, name="first")(inputs)
    x = layers.Activation(activation)(layers.BatchNormalization()(x))
    x = layers.Conv2D(16, 3, activation="relu", name="second")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
    model = compress(None, x, model)
    report = kc.export(model, tmp_path / "model.xml", data=x)
    assert report.eight_bit_layers == len(report.layers) == 3
    assert close(model, tmp_path / "model.xml", x)


@tensorflow_only
def test_zeros_among_binary_weights_take_two_bits(tmp_path):
    sparsity = {"algorithm": "const_sparsity"}
    plain = network()
    kernel = numpy(plain.get_layer("second").kernel).copy()
    kernel[0] = 0
    plain.get_layer("second").kernel.assign(kernel)
    model = compress(config(sparsity), model=plain)
    x = batch(seed=1)[0]
    report = kc.export(model, tmp_path / "model.xml", data=x)
    assert report.eight_bit_layers == len(report.layers)
    stored = codes_of(ov.Core().read_model(tmp_path / "model.xml"))
    assert stored["second"][0] == "u2" and stored["third"][0] == "u1"
    assert (stored["second"][1] == 0).sum() == (kernel == 0).sum()
    assert close(model, tmp_path / "model.xml", x)


@tensorflow_only
def test_what_is_not_switched_on_is_exported_as_it_is(tmp_path):
    params = {"activations_quant_start_epoch": 5, "weights_quant_start_epoch": 5}
    quantization = {"algorithm": "quantization", "params": params}
    model = compress(config(quantization, params=params))
    assert isinstance(quantizer_of(model, "first"), SymmetricQuantizer)
    report = kc.export(model, tmp_path / "model.xml", data=batch(seed=1)[0])
    assert report.eight_bit_layers == 0
    assert report.relative < 1e-5
    ir = ov.Core().read_model(tmp_path / "model.xml")
    assert not [op for op in ir.get_ops() if op.get_type_name() == "FakeQuantize"]


@tensorflow_only
def test_onnx_keeps_integers_of_eight_bits(tmp_path):
    import onnx

    model = trained(config(mode="ternary"), epochs=1)
    assert isinstance(quantizer_of(model, "second"), TernaryWeights)
    kc.export(model, tmp_path / "model.onnx", verify=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    names = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    stored = [tensor for tensor in graph.initializer if tensor.name in names and len(tensor.dims)]
    assert {tensor.data_type for tensor in stored} == {onnx.TensorProto.INT8}
    assert len([tensor for tensor in stored if len(tensor.dims) >= 2]) == 7
