"""Models that read text or other keys: adapted tables go where the model goes."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from keras import layers

import keras_compress as kc

CONFIG = {"compression": {"algorithm": "quantization"}}
SENTENCES = np.array(["a b c", "b d", "c c c c", "unknown a"])

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="text layers run in TensorFlow's graphs only"
)


def classifier(text_layer):
    text = keras.Input((), dtype="string", name="text")
    x = layers.Embedding(9, 4, name="embedding")(text_layer(text))
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(text, layers.Dense(2, name="head")(x), name="classifier")


def adapted():
    text_layer = layers.TextVectorization(output_sequence_length=4, name="words")
    text_layer.adapt(SENTENCES[:3])
    return text_layer


class Words(layers.Layer):
    """Holds its text layer inside, and stays whole."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = adapted()

    def call(self, inputs, training=False):
        tokens = self.words(inputs)
        return tokens if not training else tokens * 1

    def compute_output_spec(self, inputs, training=False):
        return keras.KerasTensor((None, 4), dtype="int64")


@pytest.mark.parametrize("make_layer", [adapted, Words], ids=["adapted", "inside"])
def test_an_adapted_vocabulary_is_kept(make_layer, tmp_path):
    import tensorflow as tf

    model = classifier(make_layer())
    inputs = tf.constant(SENTENCES)
    data = tf.data.Dataset.from_tensor_slices(SENTENCES).batch(4)
    compressed = kc.compress_model(model, CONFIG, data=data, verbose=False)
    expected, outputs = numpy(model(inputs)), numpy(compressed(inputs))
    assert np.abs(outputs - expected).max() <= 0.05 * np.abs(expected).max()
    np.testing.assert_array_equal(numpy(kc.strip(compressed)(inputs)), outputs)
    if make_layer is adapted:
        compressed.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(numpy(loaded(inputs)), outputs)


def test_a_saved_model_reads_text(tmp_path):
    import tensorflow as tf

    model = classifier(adapted())
    kc.export(model, tmp_path / "saved", verify=False)
    serve = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"]
    (output,) = serve(tf.constant(SENTENCES)).values()
    np.testing.assert_allclose(output, numpy(model(tf.constant(SENTENCES))), atol=1e-6)


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_text_is_refused_where_the_format_has_none(suffix, tmp_path):
    model = classifier(adapted())
    with pytest.raises(ValueError, match="input 'text' is of strings"):
        kc.export(model, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_part_behind_the_text_is_exported(tmp_path):
    model = classifier(adapted())
    numbers = keras.Model(model.get_layer("words").output, model.output)
    assert kc.export(numbers, tmp_path / "model.xml", data=np.ones((4, 4))).relative <= 1e-5
