"""ONNX through tf2onnx, with real integer weights.

Activation quantizers arrive as `QuantizeLinear`/`DequantizeLinear` pairs. tf2onnx leaves baked
weights in float: each one that lies on a grid is written as `Constant(int8) -> DequantizeLinear`.
"""

import json

import numpy as np

from keras_compress.export.integer_weights import integer_weight
from keras_compress.export.saved_model import serving_function

OPSET = 17
WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gather": -1}  # type -> channel axis


def write_onnx(model, path, input_names, output_names, metadata):
    """Write an ONNX file.

    Args:
        model: a model made by `deployable`.
        path: where to write.
        input_names, output_names: names of the tensors, in the model's order.
        metadata: JSON-able dict that goes into the file's `metadata_props`.
    """
    import onnx
    import tf2onnx
    from keras.src.export.tf2onnx_lib import patch_tf2onnx
    patch_tf2onnx()
    serve = serving_function(model, input_names, output_names)
    proto, _ = tf2onnx.convert.from_function(serve, serve.input_signature, opset=OPSET)
    print([ (i.name) for i in proto.graph.input],[ (i.name) for i in proto.graph.output])
    onnx.save(proto, str(path))
