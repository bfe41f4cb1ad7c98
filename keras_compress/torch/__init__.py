"""The PyTorch adapter: the same configuration, the same numbers, for a `torch.nn.Module`."""

import importlib.util

import keras

if importlib.util.find_spec("torch") is None:
    raise ImportError(
        "Expected torch beside keras_compress.torch. Received: no module named 'torch'. Install "
        "it: pip install keras-compress[torch]"
    )
if keras.backend.backend() != "torch":
    raise ImportError(
        "Expected Keras on its torch backend, which keras_compress.torch computes with. Received: "
        f"backend {keras.backend.backend()!r}. Write `import keras_compress.torch` before Keras "
        "is imported, or set the environment variable KERAS_BACKEND=torch"
    )

from keras_compress.torch.compression import (
    Compression,
    compress_model,
    parameter_groups,
    plan,
    report,
)
from keras_compress.torch.export import export, shrink, strip
from keras_compress.torch.fake_quantize import FakeQuantize

__all__ = [
    "Compression",
    "FakeQuantize",
    "compress_model",
    "export",
    "parameter_groups",
    "plan",
    "report",
    "shrink",
    "strip",
]
