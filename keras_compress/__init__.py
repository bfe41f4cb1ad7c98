"""Training-time model compression for Keras 3, deployed to OpenVINO IR."""

from keras_compress import callbacks, layers, quantizers
from keras_compress.algorithms import (
    Algorithm,
    Binarization,
    ConstSparsity,
    FilterPruning,
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
from keras_compress.plots import draw_pareto
from keras_compress.report import Report, report
from keras_compress.shrink import shrink
from keras_compress.training.batch_norm import adapt_batch_norm

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Binarization",
    "CompressedModel",
    "Config",
    "ConfigError",
    "ConstSparsity",
    "FilterPruning",
    "KeyStatus",
    "MagnitudeSparsity",
    "MovementSparsity",
    "Plan",
    "Quantization",
    "RBSparsity",
    "Report",
    "VerifyReport",
    "adapt_batch_norm",
    "callbacks",
    "compress_model",
    "draw_pareto",
    "export",
    "layers",
    "plan",
    "quantizers",
    "register_layer",
    "report",
    "shrink",
    "strip",
    "verify",
]
