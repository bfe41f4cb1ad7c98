"""Integer products with every kind of operation behind them: the IR computes the trained numbers.

Biases are zero, as in a fresh model or one without: what follows a product then meets its steps.
"""

import keras
import numpy as np
import openvino
import pytest
from backend_helpers import BACKEND
from keras import layers, ops

import keras_compress as kc

CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {
            "range": {"type": "min_max"},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
        },
    },
}
IMAGE, ROWS = (6, 6, 3), (6, 3)


def conv(x):
    return layers.Conv2D(4, 3, padding="same", use_bias=False)(x)


def dense(x):
    return layers.Dense(4)(x)


def scores(x):
    products = ops.matmul(dense(x), ops.transpose(dense(x), (0, 2, 1)))
    # A factor of 0 or 1: of any other, a fused multiply-add keeps digits that two steps round off.
    row_mask = ops.cast(x[..., :1] > 0, "float32") * -1e9
    masked = ops.where(products > 0, products, -1e9) + row_mask
    return ops.matmul(ops.softmax(masked), dense(x))


def positions(x):
    """Scores with a bias per position and a mask of large numbers, as in T5."""
    bias = ops.convert_to_tensor(np.random.default_rng(1).normal(size=(1, 6, 6)).astype("float32"))
    mask = ops.cast(ops.transpose(x[..., :1], (0, 2, 1)) > 0, "float32")
    products = ops.matmul(dense(x), ops.transpose(dense(x), (0, 2, 1)))
    products = products + (ops.add(bias, (mask - 1.0) * 1e9))
    return ops.matmul(ops.softmax(products), dense(x))


# name -> (input shape, what happens to the output of a first layer before the second)
IMAGES = {
    "flip": lambda y: ops.flip(y, axis=1),
    "take": lambda y: ops.take(y, [0, 2, 4], axis=1),
    "getitem": lambda y: y[:, ::2, 1:, :],
    "moveaxis": lambda y: ops.moveaxis(y, 1, 2),
    "pad": lambda y: ops.pad(y, [[0, 0], [1, 1], [1, 1], [0, 0]], mode="reflect"),
    "up_sampling": layers.UpSampling2D(2),
    "max": lambda y: y - ops.max(y, axis=(1, 2), keepdims=True),
    "mean": lambda y: y - ops.mean(y, axis=(1, 2), keepdims=True),
    "variance": lambda y: y * ops.var(y, axis=(1, 2), keepdims=True),
    "cumsum": lambda y: ops.cumsum(y, axis=1),
    "square": lambda y: y * y,
    "normalize": lambda y: ops.normalize(y, axis=-1),
    "divide": lambda y: y / (2.0 + ops.abs(y)),
    "exp": ops.exp,
    "layer_norm": layers.LayerNormalization(),
    "group_norm": layers.GroupNormalization(2),
    "rms_norm": layers.RMSNormalization(),
    "mish": lambda y: y * ops.tanh(ops.softplus(y)),
    "gated": lambda y: y[..., :2] * ops.sigmoid(y[..., 2:]),
    "two_ways": lambda y: ops.concatenate([ops.exp(y * 0.1), ops.tanh(y)], axis=-1),
    "where": lambda y: ops.where(y > 0, y, y * 0.2),
    "max_gate": lambda y: y * ops.sigmoid(ops.max(y, axis=-1, keepdims=True)),
    "selu": layers.Activation("selu"),
    "softmax": layers.Softmax(),
    "split": lambda y: ops.subtract(*ops.split(y, 2, axis=-1)),
    "minimum": lambda y: ops.minimum(y, ops.relu(-y)),
    "adaptive_pooling": layers.AdaptiveAveragePooling2D(3),
}
SEQUENCES = {
    "gated_rows": lambda y: y[..., :2] * ops.sigmoid(y[..., 2:]),
    "silu_rows": lambda y: ops.silu(dense(y)) * dense(y),
    "einsum": lambda y: ops.einsum("bij,bkj->bik", dense(y), dense(y)),
    "dot": lambda y: layers.Dot(axes=(2, 2))([dense(y), dense(y)]),
    "scores": scores,
    "positions": positions,
    "up_sampling_rows": layers.UpSampling1D(2),
    "zero_padding_rows": layers.ZeroPadding1D(1),
    "causal": lambda y: layers.Conv1D(4, 3, padding="causal", dilation_rate=2)(y),
    "causal_strided": lambda y: layers.Conv1D(4, 2, padding="causal", strides=2)(y),
    "repeat": lambda y: layers.RepeatVector(3)(y[:, 0]),
    "stack": lambda y: ops.stack([y[:, 0], y[:, 1]], axis=1),
}


def share_of_other_values(model, path, data):
    """Share of output values that the IR gives otherwise than the trained model.

    None on most processors. Where the vector instructions round an exponential another way, a value
    that lies between two steps may take the other one, and moves the few outputs that read it.
    """
    expected = keras.ops.convert_to_numpy(model(data, training=False))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    received = openvino.Core().compile_model(str(path), "CPU", exact)(data)[0]
    return np.mean(np.abs(received - expected) > 1e-6 * np.ptp(expected))


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_the_ir_computes_the_trained_numbers(name, tmp_path):
    if BACKEND != "tensorflow":
        pytest.skip("looks at the IR alone, which TensorFlow makes on every backend")
    shape = IMAGE if name in IMAGES else ROWS
    product = conv if name in IMAGES else dense
    inputs = keras.Input(shape)
    model = keras.Model(inputs, product((IMAGES | SEQUENCES)[name](product(inputs))))
    data = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
    compressed = kc.compress_model(model, CONFIG, data=data, verbose=False)
    report = kc.export(compressed, tmp_path / "model.xml", data=data)
    assert report.relative < 2e-2
    # Equal scores are ties: 1/6 of 255 steps is 42.5.
    allowed = 0.15 if name == "scores" else 0.03
    assert share_of_other_values(compressed, tmp_path / "model.xml", data) <= allowed
    products = [layer for layer in report.layers if layer.type != "Gather"]
    assert len(products) >= 2 and all(layer.eight_bit for layer in products)
