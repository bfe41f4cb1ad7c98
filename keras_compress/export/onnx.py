"""ONNX through tf2onnx, with real integer weights.

Activation quantizers arrive as `QuantizeLinear`/`DequantizeLinear` pairs. tf2onnx leaves baked
weights in float: each one that lies on a grid is written as `Constant(int8) -> DequantizeLinear`.
"""

import json

import numpy as np

from keras_compress.export.integer_weights import integer_weight
from keras_compress.export.saved_model import serving_function

OPSET = 17
# Operation -> (port of its weight, axis that has a step per index).
WEIGHTED = {
    "Conv": (1, 0),
    "ConvTranspose": (1, 1),
    "MatMul": (1, -1),
    "Gemm": (1, 1),
    "Gather": (0, -1),
}


def write_onnx(model, path, input_names, output_names, metadata):
    """Write an ONNX file.

    Args:
        model: a model made by `deployable`.
        path: where to write.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
        metadata: JSON-able dict that goes into the file's `metadata_props`.
    """
    import onnx

    proto = _converted(model, input_names, output_names)
    for values, names in ((proto.graph.input, input_names), (proto.graph.output, output_names)):
        _arrange(values, names)
    use_integer_weights(proto.graph)
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=f"keras_compress.{key}", value=text)
    _check(proto, model)
    onnx.save(proto, str(path))


def _converted(model, input_names, output_names):
    import tensorflow as tf
    import tf2onnx

    serve = serving_function(model, input_names, output_names)
    eagerly = tf.config.functions_run_eagerly()
    # Keras wraps grouped convolutions in a compiled function, which tf2onnx cannot look into.
    tf.config.run_functions_eagerly(True)
    try:
        proto, _ = tf2onnx.convert.from_function(
            serve, serve.input_signature, opset=OPSET, custom_op_handlers={"Erfc": (_erfc, [])}
        )
    finally:
        tf.config.run_functions_eagerly(eagerly)
    return proto


def _erfc(context, node, name, args):
    """Write `erfc(x)`, which Keras' gelu uses and tf2onnx lacks, as `1 - erf(x)`."""
    one = context.make_const(f"{name}/one", np.array(1, "float32"))
    erf = context.make_node("Erf", node.input[:1])
    shapes, dtypes = node.output_shapes, node.output_dtypes
    context.remove_node(node.name)
    inputs = [one.output[0], erf.output[0]]
    context.make_node("Sub", inputs, outputs=node.output, shapes=shapes, dtypes=dtypes)


def _check(proto, model):
    import onnx

    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"Model '{model.name}' has an operation that tf2onnx cannot write as ONNX: {error}"
        ) from error


def _arrange(values, names):
    """Put the inputs or outputs of a graph into the order of `names`; name the batch axis."""
    by_name = {value.name: value for value in values}
    arranged = [by_name[name] for name in names]
    for value in arranged:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del values[:]
    values.extend(arranged)


def rename_ports(graph, input_names, output_names):
    """Give the inputs and outputs of a graph names, in place; the axis of samples stays open."""
    values = [*graph.input, *graph.output]
    names = [value.name for value in values]
    renamed = dict(zip(names, input_names + output_names, strict=True))
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [renamed.get(name, name) for name in tensors]
    for value in values:
        value.name = renamed[value.name]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def use_integer_weights(graph):
    """Replace, in place, every float weight that lies on a grid; return how many were."""
    floats = {t.name: t for t in graph.initializer if t.data_type == t.FLOAT and len(t.dims) >= 2}
    found, nodes = {}, []
    for node in graph.node:
        port, axis = WEIGHTED.get(node.op_type, (None, None))
        if node.op_type == "Gemm" and _is_flipped(node):
            axis = 0
        source = floats.get(node.input[port]) if port is not None else None
        if source is not None:
            key = source.name, axis
            if key not in found:
                found[key] = _dequantized(graph, source, axis)
                nodes.extend(found[key][1:])
            node.input[port] = found[key][0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return sum(len(entry) > 1 for entry in found.values())


def _is_flipped(node):
    """Whether a `Gemm` reads its weight as (outputs, inputs)."""
    return any(each.name == "transB" and each.i for each in node.attribute)


def _dequantized(graph, source, axis):
    """Return (name of the float tensor, node that makes it), or (name,) where it stays as it is."""
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(source)
    weight = integer_weight(values, (axis,))
    if weight is None:
        return (source.name,)
    names = [f"{source.name}/{part}" for part in ("codes", "step", "zero_point", "dequantized")]
    arrays = (weight.codes, weight.step.ravel(), (-weight.offset).astype("int8").ravel())
    for name, array in zip(names, arrays, strict=False):
        graph.initializer.append(numpy_helper.from_array(array, name))
    *inputs, output = names
    axis %= values.ndim
    return output, helper.make_node("DequantizeLinear", inputs, [output], name=output, axis=axis)


def _drop_unused(graph):
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
