"""Shipping a trained model: SavedModel, OpenVINO IR, ONNX, each checked against the model."""

import logging

import keras
import numpy as np

from keras_compress.compressed_layer import PACKAGE
from keras_compress.export.benchmark import benchmark
from keras_compress.export.child import export_in_child
from keras_compress.export.files import checked_target
from keras_compress.export.formats import write
from keras_compress.export.saved_model import signature_names
from keras_compress.export.verify import VerifyReport, verify
from keras_compress.whole_files import replacing

__all__ = ["VerifyReport", "benchmark", "export", "verify"]

SUSPICIOUS = 0.05  # relative difference above which the log says so

logger = logging.getLogger(PACKAGE)


def export(model, path, *, verify=True, data=None):
    """Write a model for deployment; the suffix of the path decides the format.

    | path | format |
    |---|---|
    | `model.xml` | OpenVINO IR: int8 weights, `FakeQuantize` on activations; and `model.bin` |
    | `model.onnx` | ONNX: int8 weights and Q/DQ pairs, for ONNX Runtime, TensorRT and OpenVINO |
    | `model` | TensorFlow SavedModel directory |

    Names and order of inputs and outputs are the model's, and the batch size stays open. The
    output appears whole or not at all: an export that fails leaves an earlier file untouched.
    On JAX and torch the conversion runs in a child process under TensorFlow.

    Args:
        model: compressed, stripped or plain Keras model (the float baseline).
        path: where to write, in a folder that exists.
        verify: whether to run the result on this machine's CPU against the model (see `verify`).
        data: samples for that comparison. None: random inputs.

    Returns:
        A `VerifyReport`, or None where `verify` is False.

    Raises:
        ValueError: unknown suffix; inputs of strings in IR or ONNX; a model that is unbuilt,
            whose ranges are not set, or whose weights are not all numbers.
        OSError: the output cannot be written.

    Example:

    >>> report = kc.export(model, "model.xml")
    >>> report.relative < 1e-3
    True
    """
    target = checked_target(path)
    _check_inputs(model, target)
    _check_numbers(model)
    input_names, output_names = signature_names(model)
    arguments = input_names, output_names, _metadata(model)
    suffixes = (".bin", ".xml") if target.suffix == ".xml" else ()
    on_tensorflow = keras.backend.backend() == "tensorflow"
    with replacing(target, *suffixes) as temporary:
        (write if on_tensorflow else export_in_child)(model, temporary, *arguments)
    return _verified(model, target, data) if verify else None


def _check_inputs(model, target):
    """Raise where the format of the target has no form of a model's inputs."""
    texts = [tensor for tensor in getattr(model, "inputs", ()) if tensor.dtype == "string"]
    if texts and target.suffix:
        raise ValueError(
            f"Expected inputs of numbers: {target.suffix} files have no layers that read text. "
            f"Received: model '{model.name}', whose input '{texts[0].name}' is of strings. Export "
            "the part behind its text layers, `keras.Model(text_layer.output, model.output)`, or "
            "a SavedModel (a path without suffix)."
        )


def _check_numbers(model):
    """Raise where training has left NaN, or infinity in a trained weight: no output can be right.

    Constants may be infinite, such as what an attention layer adds where it must not look.
    """
    for variable in getattr(model, "weights", ()):
        values = keras.ops.convert_to_numpy(variable)
        if values.dtype.kind not in "fV":
            continue
        values = values.astype("float32")
        strange = np.isnan(values).sum() + (variable.trainable and np.isinf(values).sum())
        if strange:
            raise ValueError(
                f"Expected weights that are numbers. Received: model '{model.name}', where "
                f"{strange} of the {values.size} values of '{variable.path}' are NaN or infinite, "
                "as after a training that diverged. Export an earlier state of it."
            )


def _metadata(model):
    """Return what an exported file says about its origin."""
    from keras_compress import __version__

    config = getattr(model, "config", None)
    return {
        "version": __version__,
        "model": model.name,
        "config": config.to_dict() if config is not None else {},
    }


def _verified(model, target, data):
    report = verify(model, target, data)
    if not report.relative <= SUSPICIOUS:
        logger.warning(
            "%s differs from the trained model by %.2g of the output range on this processor (%s).",
            target,
            report.relative,
            report.device,
        )
    return report
