"""Training-time model compression for Keras 3, deployed to OpenVINO IR."""

from keras_compress import callbacks, layers, quantizers
from keras_compress.algorithms import Quantization
from keras_compress.compress import CompressedModel, compress_model, plan, strip
from keras_compress.config import Config

__version__ = "0.1.0"
