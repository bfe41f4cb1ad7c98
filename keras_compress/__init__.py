"""Training-time model compression for Keras 3, deployed to OpenVINO IR."""
# ruff: noqa: E402

import importlib.util
import os
import sys
import traceback


def _is_imported_for_torch():
    """Whether `import keras_compress.torch` is what this package is being imported for.

    Python imports a package before what is in it, and this package imports Keras, which chooses its
    backend then. The names that are being imported are in the frames of Python's import system.
    Where those look different, `keras_compress.torch` says which variable to set.
    """
    frames = (frame for frame, _ in traceback.walk_stack(None))
    imports = (each for each in frames if each.f_globals.get("__name__") == "importlib._bootstrap")
    names = (str(each.f_locals.get("name")) for each in imports)
    return any(f"{name}.".startswith("keras_compress.torch.") for name in names)


if "keras" not in sys.modules and importlib.util.find_spec("torch") and _is_imported_for_torch():
    os.environ.setdefault("KERAS_BACKEND", "torch")

from keras_compress import callbacks, layers, quantizers
from keras_compress.accuracy_aware import EpochResult
from keras_compress.accuracy_aware_fit import accuracy_aware_fit
from keras_compress.algorithms import (
    Algorithm,
    Binarization,
    ConstSparsity,
    FilterPruning,
    KnowledgeDistillation,
    MagnitudeSparsity,
    MovementSparsity,
    Quantization,
    RBSparsity,
)
from keras_compress.compress import compress_model, plan
from keras_compress.compressed_model import CompressedModel
from keras_compress.config import Config
from keras_compress.export import VerifyReport, export, verify
from keras_compress.layers import register_layer
from keras_compress.options import ConfigError, KeyStatus
from keras_compress.plan import Plan
from keras_compress.plots import draw_accuracy, draw_pareto
from keras_compress.report import Report, report
from keras_compress.sensitivity import Sensitivity, sensitivity
from keras_compress.shrink import shrink
from keras_compress.stepping import finish, step
from keras_compress.strip import strip
from keras_compress.training.accuracy_result import AccuracyAwareResult
from keras_compress.training.batch_norm import adapt_batch_norm

__version__ = "0.1.0"

__all__ = [
    "AccuracyAwareResult",
    "Algorithm",
    "Binarization",
    "CompressedModel",
    "Config",
    "ConfigError",
    "ConstSparsity",
    "EpochResult",
    "FilterPruning",
    "KeyStatus",
    "KnowledgeDistillation",
    "MagnitudeSparsity",
    "MovementSparsity",
    "Plan",
    "Quantization",
    "RBSparsity",
    "Report",
    "Sensitivity",
    "VerifyReport",
    "accuracy_aware_fit",
    "adapt_batch_norm",
    "callbacks",
    "compress_model",
    "draw_accuracy",
    "draw_pareto",
    "export",
    "finish",
    "layers",
    "plan",
    "quantizers",
    "register_layer",
    "report",
    "sensitivity",
    "shrink",
    "step",
    "strip",
    "verify",
]
