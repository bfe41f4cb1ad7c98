"""Shipping a trained model: SavedModel, OpenVINO IR, ONNX, each checked against the model."""

import contextlib
import logging

import keras

from keras_compress.export.child import export_in_child
from keras_compress.export.files import checked_target, replacing
from keras_compress.export.onnx import write_onnx
from keras_compress.export.openvino import write_ir
from keras_compress.export.saved_model import deployable, signature_names, write_saved_model
from keras_compress.export.verify import VerifyReport, verify
