"""ONNX: integer weights, Q/DQ activations, the trained numbers under ONNX Runtime and OpenVINO."""

import keras
import models
import numpy as np
import onnx
import onnxruntime
import pytest
from export_helpers import IMAGE, compressed, images, network, outputs_of

import keras_compress as kc


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = compressed()
    return model, path, kc.export(model, path, data=images())


def run(path, inputs):
    options = onnxruntime.SessionOptions()
    # Its fused integer kernels requantize on their own terms; the file is what is tested.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options).run(None, inputs)


def test_onnx_runtime_gives_the_trained_numbers(exported):
    model, path, _ = exported
    for expected, received in zip(outputs_of(model), run(path, {IMAGE: images()}), strict=True):
        difference = np.abs(received - expected) / np.ptp(expected)
        assert np.median(difference) < 1e-6
        assert difference.max() < 0.02


def test_names_order_and_open_batch_are_kept(exported):
    graph = onnx.load(exported[1]).graph
    assert [value.name for value in graph.input] == [IMAGE]
    assert [value.name for value in graph.output] == ["logits", "auxiliary"]
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input
    ]
    assert shapes == [["batch", 16, 16, 3]]


def test_weights_are_int8_with_a_step_per_channel(exported):
    proto = onnx.load(exported[1])
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights = [
        n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors
    ]
    assert len(weights) == 7
    for node in weights:
        codes, step, zero = (tensors[name] for name in node.input)
        assert codes.data_type == zero.data_type == onnx.TensorProto.INT8
        assert step.dims[0] == codes.dims[node.attribute[0].i] > 1
    assert not [
        t.name
        for t in tensors.values()
        if t.data_type == 1 and len(t.dims) > 1 and np.prod(t.dims) > 64
    ]
    assert proto.opset_import[0].version >= 15


def test_openvino_runs_it_in_8_bits(exported):
    report = exported[2]
    assert report.eight_bit_layers == len(report.layers) == 7
    assert report.outputs[0].top1 > 0.9


def test_the_file_tells_its_origin(exported):
    properties = {p.key: p.value for p in onnx.load(exported[1]).metadata_props}
    assert properties["keras_compress.version"] == kc.__version__


def test_a_float_model_stays_float(tmp_path):
    report = kc.export(network(), tmp_path / "float.onnx")
    assert report.relative < 1e-5
    assert report.eight_bit_layers == 0


@pytest.mark.parametrize(
    "name", ["attention", "transposed_and_grouped", "passed_through", "list_inputs_outputs"]
)
def test_models_tf2onnx_stumbles_over_are_exported(tmp_path, name):
    report = kc.export(models.make(name), tmp_path / "model.onnx")
    assert report.relative < 1e-5


def test_operations_onnx_lacks_are_named(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.erfinv(keras.ops.tanh(inputs)), name="odd")
    error = ValueError if keras.backend.backend() == "tensorflow" else RuntimeError
    with pytest.raises(error, match=r"cannot write as ONNX[\s\S]*Erfinv"):
        kc.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
