"""The architectures of the coverage page: small inputs, random weights, real batch-norm statistics.

`NAMES` lists them; `make(name)` returns (built model, data for 8 samples).
"""

import hub
import keras
import numpy as np

from keras_compress.training.batch_norm import adapt_batch_norm

SAMPLES = 8
SIZE = 64
LARGER = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}  # the smallest they accept
APPLICATIONS = [
    name
    for name, value in vars(keras.applications).items()
    if name[0].isupper() and callable(value)
]
NAMES = [*APPLICATIONS, *hub.NAMES]


def make(name):
    """Return (built model, data): the weights depend on the name alone."""
    if name in hub.NAMES:
        return hub.make(name)
    keras.utils.set_random_seed(0)
    size = LARGER.get(name, SIZE)
    function = getattr(keras.applications, name)
    model = function(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    if name.startswith("VGG"):  # without normalizations, values would fade below any range
        he_normal = keras.initializers.HeNormal(seed=0)
        for layer in model.layers:
            for kernel in layer.weights[:1]:
                kernel.assign(he_normal(kernel.shape))
    scale = 255.0 if name.startswith(("EfficientNet", "ConvNeXt", "MobileNetV3")) else 1.0
    data = scale * np.random.default_rng(0).random((SAMPLES, size, size, 3)).astype("float32")
    adapt_batch_norm(model, [[data]])
    return model, data
