"""Training-time model compression for Keras 3, deployed to OpenVINO IR."""

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
from keras_compress.compressed_model import CompressedModel, strip
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
