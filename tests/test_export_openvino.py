"""OpenVINO IR: the trained numbers, in 8 bits, under the model's names."""

import json
import os
import subprocess
import sys

import keras
import models
import numpy as np
import openvino as ov
import pytest
from export_helpers import CONFIG, IMAGE, compressed, images, network, outputs_of
from openvino import opset15

import keras_compress as kc
from keras_compress.export import openvino as export_openvino
from keras_compress.export.child import export_in_child
from keras_compress.export.verify import compile_on_cpu

WEIGHTED = ["first", "second", "third", "depthwise", "transposed", "auxiliary", "logits"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(compressed model, folder with int8.xml, float.xml and stripped.xml, reports)."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("ir")
    plain = network()
    model = compressed(plain)
    reports = {
        "int8": kc.export(model, folder / "int8.xml", data=images()),
        "float": kc.export(plain, folder / "float.xml", data=images()),
        "stripped": kc.export(kc.strip(model), str(folder / "stripped.xml"), data=images()),
    }
    return model, folder, reports


def bits_config(weights=8, activations=8, **weight_options):
    quantization = CONFIG["compression"] | {
        "weights": {"bits": weights, **weight_options},
        "activations": {"bits": activations},
    }
    return {"target_device": "TRIAL", "compression": quantization}


def run(path, data=None):
    compiled = compile_on_cpu(ov.Core(), path)
    results = compiled(images() if data is None else data)
    return [np.array(results[port]) for port in compiled.outputs]


@pytest.mark.parametrize("name", ["int8", "stripped"])
def test_every_weighted_layer_runs_in_8_bits_under_its_own_name(exported, name):
    layers = exported[2][name].layers
    assert sorted(layer.layer for layer in layers) == sorted(WEIGHTED)
    assert all(layer.precision in ("i8", "u8") for layer in layers), layers


def test_a_float_model_stays_float(exported):
    report = exported[2]["float"]
    assert sorted(layer.layer for layer in report.layers) == sorted(WEIGHTED)
    assert report.eight_bit_layers == 0
    assert report.relative < 1e-5


@pytest.mark.parametrize("name", ["int8", "stripped"])
def test_outputs_are_the_trained_models(exported, name):
    model, folder, _ = exported
    for expected, received in zip(outputs_of(model), run(folder / f"{name}.xml"), strict=True):
        difference = np.abs(received - expected) / np.ptp(expected)
        # Two ways of summing may round one value to neighbouring levels, here and there.
        assert np.median(difference) < 1e-6
        assert difference.max() < 0.02


def test_int8_takes_a_third_of_the_bytes(exported):
    small, large = (os.path.getsize(exported[1] / f"{n}.bin") for n in ("int8", "float"))
    assert small <= 0.30 * large


def test_names_order_and_open_batch_are_kept(exported):
    model, folder, _ = exported
    ov_model = ov.Core().read_model(folder / "int8.xml")
    assert [port.get_names() for port in ov_model.inputs] == [{IMAGE}]
    assert [port.get_names() for port in ov_model.outputs] == [{"logits"}, {"auxiliary"}]
    assert [node.get_friendly_name() for node in ov_model.get_results()] == model.output_names
    assert ov_model.get_parameters()[0].get_friendly_name() == IMAGE
    assert ov_model.input().get_partial_shape()[0].is_dynamic
    assert run(folder / "int8.xml", images(3))[0].shape == (3, 10)


def test_the_file_tells_its_origin(exported):
    model, folder, _ = exported
    ov_model = ov.Core().read_model(folder / "int8.xml")
    assert ov_model.get_rt_info(["keras_compress", "version"]).astype(str) == kc.__version__
    config = json.loads(ov_model.get_rt_info(["keras_compress", "config"]).astype(str))
    assert config == json.loads(json.dumps(model.config.to_dict()))


def test_only_the_exported_files_are_left(exported):
    names = {path.name for path in exported[1].iterdir()}
    stems = ("int8", "float", "stripped")
    assert names == {f"{n}{s}" for n in stems for s in (".xml", ".bin", ".verify.json")}


@pytest.mark.parametrize(
    ("weights", "activations", "storage"), [(4, 8, "i4"), (2, 4, "u2"), (6, 2, "i8"), (3, 6, "i4")]
)
def test_fewer_bits_are_stored_narrow_and_run_in_8_bits(tmp_path, weights, activations, storage):
    model = compressed(config=bits_config(weights, activations))
    report = kc.export(model, tmp_path / "low.xml", data=images())
    assert report.eight_bit_layers == len(report.layers) == len(WEIGHTED)
    ov_model = ov.Core().read_model(tmp_path / "low.xml")
    codes = [op for op in ov_model.get_ops() if op.get_friendly_name().endswith("/codes")]
    assert {op.get_element_type().get_type_name() for op in codes} == {storage}
    for expected, received in zip(outputs_of(model), run(tmp_path / "low.xml"), strict=True):
        assert np.median(np.abs(received - expected)) < 1e-6 * np.ptp(expected)


def test_asymmetric_weights_keep_their_numbers(tmp_path):
    model = compressed(config=bits_config(mode="asymmetric"))
    kc.export(model, tmp_path / "asymmetric.xml", verify=False)
    for expected, received in zip(outputs_of(model), run(tmp_path / "asymmetric.xml"), strict=True):
        assert np.median(np.abs(received - expected)) < 1e-6 * np.ptp(expected)


def test_seven_bit_weights_do_not_overflow_without_vnni(tmp_path):
    """Without VNNI pairs of products are added in 16 bits: `overflow_fix` keeps them inside."""
    inputs = keras.Input((8, 8, 32), name=IMAGE)
    outputs = keras.layers.Conv2D(16, 3, name="conv")(inputs)
    plain = keras.Model(inputs, outputs)
    plain.layers[1].kernel.assign(np.abs(keras.ops.convert_to_numpy(plain.layers[1].kernel)))
    data = np.abs(np.random.default_rng(0).normal(size=(8, 8, 8, 32))).astype("float32")
    np.save(tmp_path / "data.npy", data)
    differences = {}
    for overflow_fix in ("enable", "disable"):
        quantization = CONFIG["compression"] | {"overflow_fix": overflow_fix}
        model = compressed(plain, CONFIG | {"compression": quantization}, data)
        kc.export(model, tmp_path / "model.xml", verify=False)
        received = run_without_vnni(tmp_path)
        expected = outputs_of(model, data)[0]
        differences[overflow_fix] = np.abs(received - expected).max() / np.ptp(expected)
    assert differences["enable"] < 1e-4
    assert differences["disable"] > 1e-2


def run_without_vnni(folder):
    code = (
        "import numpy, openvino, sys; folder = sys.argv[1]\n"
        "exact = {'INFERENCE_PRECISION_HINT': 'f32'}\n"
        "compiled = openvino.Core().compile_model(folder + '/model.xml', 'CPU', exact)\n"
        "numpy.save(folder + '/out.npy', compiled(numpy.load(folder + '/data.npy'))[0])"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
    return np.load(folder / "out.npy")


@pytest.mark.parametrize(
    "name",
    [
        "dict_inputs_outputs",
        "list_inputs_outputs",
        "subclassed_two_inputs",
        "nested_dict",
        "passed_through",
        "other_ranks",
        "transposed_and_grouped",
        "tokens",
        "attention",
    ],
)
def test_float_models_of_every_shape_are_exported(tmp_path, name):
    report = kc.export(models.make(name), tmp_path / "model.xml")
    assert report.relative < 1e-5


def test_an_embedding_is_looked_up_in_integers(tmp_path):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(40, 8, name="table")(tokens)
    plain = keras.Model(tokens, keras.layers.Dense(3, name="head")(x))
    data = np.random.default_rng(0).integers(0, 40, (64, 6)).astype("int32")
    model = compressed(plain, data=data)
    report = kc.export(model, tmp_path / "model.xml")
    assert {layer.layer: layer.precision for layer in report.layers} == {
        "table": "i8",
        "head": "i8",
    }
    assert report.relative < 1e-5


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    target = tmp_path / "model.xml"
    target.write_text("earlier")

    def fail(*args, **kwargs):
        raise RuntimeError("no disk left")

    monkeypatch.setattr(ov, "save_model", fail)
    if keras.backend.backend() != "tensorflow":  # the child process would not see the patch
        monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(RuntimeError, match="no disk left"):
        kc.export(network(), target)
    assert [path.name for path in tmp_path.iterdir()] == ["model.xml"]
    assert target.read_text() == "earlier"


def test_the_suffix_is_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="suffix of the path decides"):
        kc.export("not even a model", tmp_path / "model.tflite")


def test_the_child_process_writes_the_same_file(exported, tmp_path):
    model, folder, _ = exported
    export_in_child(model, tmp_path / "int8.xml", [IMAGE], ["logits", "auxiliary"], {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "int8.bin",
        "int8.xml",
    ]
    for expected, received in zip(
        run(folder / "int8.xml"), run(tmp_path / "int8.xml"), strict=True
    ):
        np.testing.assert_array_equal(received, expected)


def test_what_the_child_says_about_a_failure_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"'network' runs under TensorFlow[\s\S]*ValueError"):
        export_in_child(network(), tmp_path / "model.xml", [IMAGE], ["one too few"], {})


@pytest.mark.parametrize("residual", [True, False])
def test_roundings_before_additions_are_kept_apart(residual):
    """The plugin would leave out the rounding of a convolution's output that is added."""
    data = opset15.parameter([-1, 4, 8, 8], np.float32)
    bounds = [opset15.constant(np.float32(v)) for v in (-1, 1, -1, 1)]
    kernel = opset15.constant(np.ones((4, 4, 1, 1), "float32"))
    x = opset15.convolution(data, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    x = opset15.fake_quantize(opset15.relu(x), *bounds, 256)
    if residual:
        x = opset15.add(x, data)
    ov_model = ov.Model([opset15.result(x)], [data])
    assert export_openvino.keep_rounding(ov_model) == residual


@pytest.mark.parametrize("bits", [2, 4])
def test_small_codes_are_packed_from_the_lowest_bits(bits):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype("int8")
    packed = export_openvino._packed(codes, bits)
    assert packed.size == codes.size * bits // 8
    first = packed[0] & (2**bits - 1)
    assert first == codes[0] & (2**bits - 1)
