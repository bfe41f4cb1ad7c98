"""The table of formats: which function writes which suffix."""

import pathlib

from keras_compress.export.onnx import write_onnx
from keras_compress.export.openvino import write_ir
from keras_compress.export.saved_model import deployable, write_saved_model

FORMATS = {".xml": write_ir, ".onnx": write_onnx, "": write_saved_model}


def write(model, path, input_names, output_names, metadata):
    """Write a model in the format of the path's suffix. Keras must run on TensorFlow.

    Args:
        model: compressed, stripped or plain Keras model.
        path: where to write.
        input_names: names of the input tensors, in the model's order.
        output_names: the same of the output tensors.
        metadata: JSON-able dict that goes into the file.
    """
    path = pathlib.Path(path)
    FORMATS[path.suffix](deployable(model), path, input_names, output_names, metadata)
