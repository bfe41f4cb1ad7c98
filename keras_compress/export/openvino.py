"""OpenVINO IR with real integer weights.

The converter turns activation quantizers into `FakeQuantize` but leaves baked weights in float.
`use_integer_weights` writes each weight that lies on a grid as

    Constant(i8) -> Convert(f32) -> [Subtract(offset)] -> Multiply(step)

from which the CPU plugin makes u8 x i8 convolutions and matrix products. Constants of 2 and 4 bits
go through an additional `Convert(i8)`: without it they would be computed in float. Those of 1 bit
choose between two numbers, `Convert(boolean) -> Select(1, -1)`.
"""

import hashlib
import json
import re

import numpy as np

from keras_compress.compressed_layer import layer_spec
from keras_compress.export.integer_weights import integer_weight
from keras_compress.export.plugin_repairs import (
    ARITHMETIC,
    CONVOLUTIONS,
    give_biases,
    join_binarizers,
    keep_clips,
    keep_masks,
    keep_rounding,
)
from keras_compress.export.saved_model import write_saved_model
from keras_compress.graph.walk import unique_name

# Operations that belong to a layer when they follow its convolution or matrix product: layout
# always, arithmetic with a constant (bias, batch norm).
NORMALIZATION = "BatchNormInference"  # as PyTorch's batch norm arrives
LAYOUT = ("Reshape", "Squeeze", "Transpose", "BatchToSpace")


def write_ir(model, path, input_names, output_names, metadata):
    """Write `path` (.xml) and the .bin beside it.

    Args:
        model: a model made by `deployable`.
        path: where to write.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
        metadata: JSON-able dict that goes into the model's `rt_info`.
    """
    import openvino as ov

    folder = path.with_suffix(".saved_model")
    write_saved_model(model, folder, input_names, output_names, metadata)
    ov_model = _with_names(read_saved_model(folder), input_names, output_names)
    name_layers(ov_model, model)
    run_in_integers(ov_model)
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        ov_model.set_rt_info(text, ["keras_compress", key])
    ov.save_model(ov_model, str(path), compress_to_fp16=False)


def run_in_integers(ov_model):
    """Give a model integer weights and what else the CPU plugin needs to run it in 8 bits."""
    use_integer_weights(ov_model)
    for repair in (join_binarizers, keep_rounding, keep_masks, keep_clips, give_biases):
        repair(ov_model)


def read_saved_model(folder):
    """Return a SavedModel directory as an `openvino.Model`, its constants folded.

    Raises:
        ValueError: OpenVINO knows no equivalent of one of its operations.
    """
    # `ov.convert_model` would also fold batch norms into weights: layers could then no longer be
    # recognized by their weights. The plugin does the same folding when it compiles.
    from openvino.frontend import FrontEndManager, OpConversionFailure

    frontend = FrontEndManager().load_by_framework("tf")
    try:
        ov_model = frontend.convert(frontend.load(str(folder)))
    except (OpConversionFailure, RuntimeError) as error:
        # Where it goes on behind what it does not know, it may fail at an operation that it does.
        found = re.search(r"No conversion rule found for operations: (.*)", str(error))
        raise ValueError(
            "Expected operations of TensorFlow that OpenVINO has an equivalent of. Received: "
            f"{found[1].strip() if found else error}. Compute in another way what leads to them "
            "(`keras.ops.argmax` leads to Bitcast), or export a SavedModel (a path without suffix)."
        ) from None
    fold_constants(ov_model)
    return ov_model


def fold_constants(ov_model):
    """Compute, in place, what no input goes into."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(ov_model)


def _with_names(ov_model, input_names, output_names):
    """Return the model with inputs and outputs in the given order and under the given names."""
    import openvino as ov

    parameters = _arranged(ov_model.get_parameters(), input_names)
    results = _arranged(ov_model.get_results(), output_names)
    names = {}  # several outputs, or an input and an output, may be one tensor
    for port, name in zip(
        [node.output(0) for node in parameters] + [node.input_value(0) for node in results],
        input_names + output_names,
        strict=True,
    ):
        tensor = port.get_node().get_name(), port.get_index()
        names[tensor] = names.get(tensor, set()) | {name}
        port.get_tensor().set_names(names[tensor])
    for node, name in zip(parameters + results, input_names + output_names, strict=True):
        node.set_friendly_name(name)
    return ov.Model(results, parameters, ov_model.get_friendly_name())


def _arranged(nodes, names):
    """Order nodes by name: their own, else that of their tensor; each is taken once."""
    left = list(nodes)
    for name in names:
        known = [n for n in left if name in (n.get_friendly_name(), *n.output(0).get_names())]
        known.sort(key=lambda node: node.get_friendly_name() != name)
        left.remove(known[0])
        left.append(known[0])
    return left


def weighted_operations(ov_model):
    """Yield (operation, port of its weight, kept axes) for every operation with a float constant
    weight.
    """
    for op in ov_model.get_ordered_ops():
        kind = op.get_type_name()
        if kind in CONVOLUTIONS:
            candidates = [(1, CONVOLUTIONS[kind])]
        elif kind == "MatMul":
            candidates = list(_matrix_operands(op))
        elif kind == "Gather":
            candidates = [(0, (-1,))]
        elif kind == "Loop":  # of a recurrent layer: matrix products with what enters the loop
            candidates = [(port, (-1,)) for port in range(op.get_input_size())]
        else:
            continue
        for port, kept in candidates:
            source = op.input_value(port).get_node()
            if _is_float_weight(source):
                yield op, port, kept


def _matrix_operands(op):
    """Yield (port, kept axes) of a MatMul: all axes but the one that is summed over."""
    attributes = op.get_attributes()
    for port, summed, flipped in ((1, -2, "transpose_b"), (0, -1, "transpose_a")):
        summed = -3 - summed if attributes[flipped] else summed
        rank = len(op.input_value(port).get_partial_shape())
        yield port, tuple(axis for axis in range(-rank, 0) if axis != summed)


def _is_float_weight(node):
    return (
        node.get_type_name() == "Constant"
        and node.get_element_type().get_type_name() == "f32"
        and len(node.get_output_shape(0)) >= 2
    )


def use_integer_weights(ov_model):
    """Replace, in place, every float weight that lies on a grid; return how many were."""
    found = {}
    for op, port, kept in list(weighted_operations(ov_model)):
        source = op.input_value(port).get_node()
        key = source.get_friendly_name(), kept
        if key not in found:
            found[key] = integer_weight(source.data, kept)
        # With an offset the CPU plugin's integer kernels give other numbers than the model: such
        # weights, asymmetric ones without a grid around zero, stay in float.
        if found[key] is None or found[key].offset.any():
            continue
        if op.get_type_name() == "Gather":
            _gather_integers(op, source, found[key])
        else:
            dequantized = _dequantized(_integers(found[key], source), found[key], source)
            op.input(port).replace_source_output(dequantized.output(0))
    ov_model.validate_nodes_and_infer_types()
    return sum(weight is not None for weight in found.values())


def _gather_integers(op, source, weight):
    """Look up integers and scale the few rows found, rather than the whole table."""
    from openvino import opset15

    rows = opset15.gather(_integers(weight, source), op.input_value(1), op.input_value(2))
    flat = weight._replace(step=weight.step[0], offset=weight.offset[0])
    rows.set_friendly_name(op.get_friendly_name())
    dequantized = _dequantized(rows, flat, source)
    for reader in op.output(0).get_target_inputs():
        reader.replace_source_output(dequantized.output(0))


def _integers(weight, source):
    """Return the i8 node of the codes; fewer bits are widened when the model is compiled."""
    import openvino as ov
    from openvino import opset15

    name = source.get_friendly_name()
    if weight.storage == "i8":
        constant = opset15.constant(weight.codes)
        constant.set_friendly_name(f"{name}/codes")
        return constant
    if weight.storage == "u1":
        return _signs(weight.codes, name)
    bits = int(weight.storage[1:])
    smallest = int(weight.codes.min()) if weight.storage == "u2" else 0
    packed = _packed(weight.codes - smallest, bits)
    tensor = ov.Tensor(packed, ov.Shape(weight.codes.shape), getattr(ov.Type, weight.storage))
    constant = ov.op.Constant(tensor, False)
    constant.set_friendly_name(f"{name}/codes")
    wide = opset15.convert(constant, "i8")
    return opset15.subtract(wide, opset15.constant(np.int8(-smallest))) if smallest else wide


def _signs(codes, name):
    """Return the i8 node of codes that are 1 or -1, stored in one bit each."""
    import openvino as ov
    from openvino import opset15

    packed = np.packbits(codes.ravel() > 0)  # the first in the highest bit
    constant = ov.op.Constant(ov.Tensor(packed, ov.Shape(codes.shape), ov.Type.u1), False)
    constant.set_friendly_name(f"{name}/codes")
    is_positive = opset15.convert(constant, "boolean")
    return opset15.select(is_positive, opset15.constant(np.int8(1)), opset15.constant(np.int8(-1)))


def _packed(codes, bits):
    """Pack small whole numbers into bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    flat = codes.ravel().astype("int16") & (2**bits - 1)
    flat = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    return (flat << (bits * np.arange(per_byte))).sum(axis=1).astype("uint8")


def _dequantized(integers, weight, source):
    from openvino import opset15

    value = opset15.convert(integers, "f32")
    if weight.offset.any():
        value = opset15.subtract(value, opset15.constant(-weight.offset.astype("float32")))
    value = opset15.multiply(value, opset15.constant(weight.step))
    value.set_friendly_name(f"{source.get_friendly_name()}/dequantized")
    return value


def name_layers(ov_model, model):
    """Give operations the names of the Keras layers they come from, in place.

    The converter's names are lost where it changes the data layout. A layer is recognized by its
    weight's values, in any order: `sorted(constant) == sorted(kernel)`.
    """
    layers = {}
    for layer in model.layers:
        spec = layer_spec(layer)
        for weight in spec.weights if spec else ():
            digest = _digest(np.asarray(spec.read(layer, weight)))
            layers.setdefault(digest, (layer.name, weight))
    taken = {op.get_friendly_name() for op in ov_model.get_ops()}
    constants = set()
    for op, port, _ in weighted_operations(ov_model):
        constant = op.input_value(port).get_node()
        layer, weight = layers.get(_digest(constant.data), (None, None))
        if layer is not None:
            # A layer that is called twice may have its weight twice.
            constant.set_friendly_name(unique_name(f"{layer}/{weight}", constants))
            if op.get_type_name() != "Loop":
                _name_chain(op, layer, taken)


def _digest(array):
    flat = np.sort(array.astype("float32"), axis=None)
    return hashlib.sha256(flat.tobytes()).digest()


def _name_chain(op, layer, taken):
    """Name an operation after its layer, and what follows it alone: bias, batch norm, layout."""
    while op is not None:
        op.set_friendly_name(unique_name(f"{layer}/{op.get_type_name()}", taken))
        op = _follower(op)


def _follower(op):
    """Return the only reader of an operation if it belongs to the same layer, or None."""
    readers = list(op.output(0).get_target_inputs())
    if len(readers) != 1:
        return None
    reader = readers[0].get_node()
    kind = reader.get_type_name()
    constants = [v.get_node().get_type_name() == "Constant" for v in reader.input_values()]
    if kind in LAYOUT or (kind in (*ARITHMETIC, NORMALIZATION) and any(constants)):
        return reader
    return None
