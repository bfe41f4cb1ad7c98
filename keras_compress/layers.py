"""The layer classes that compression puts in place of Keras' own, and the layer on an edge.

`FakeQuant*` classes are here, `Prunable*` classes in `prunable_layers.py`; what they have in
common is in `compressed_layer.py`.
"""

import keras

from keras_compress.compressed_layer import (  # noqa: F401  (imported from here elsewhere)
    PACKAGE,
    CompressedLayer,
    RecurrentWeights,
    clone_layer,
    is_weighted,
    layer_spec,
    revived,
    serialized,
)
from keras_compress.layer_specs import LAYERS, add_row, supported_class
from keras_compress.prunable_layers import (  # noqa: F401  (imported from here elsewhere)
    PRUNABLE_LAYERS,
    Prunable,
    PrunableBatchNormalization,
    PrunableConv1D,
    PrunableConv1DTranspose,
    PrunableConv2D,
    PrunableConv2DTranspose,
    PrunableConv3D,
    PrunableConv3DTranspose,
    PrunableDense,
    PrunableDepthwiseConv1D,
    PrunableDepthwiseConv2D,
    PrunableEinsumDense,
    PrunableEmbedding,
    PrunableGroupNormalization,
    PrunableGRU,
    PrunableLayerNormalization,
    PrunableLSTM,
    PrunableReversibleEmbedding,
    PrunableRMSNormalization,
    PrunableSeparableConv1D,
    PrunableSeparableConv2D,
    PrunableSimpleRNN,
)
from keras_compress.quantizers import Quantizer, SymmetricQuantizer

FAKE_QUANT_LAYERS = {}  # Keras layer class -> its FakeQuant class, filled by subclassing


def compressed_class(layer, transforms):
    """Return the compressed class that takes the place of a plain Keras layer.

    Args:
        layer: the plain layer.
        transforms: dict {weight attribute: list of `Transform`} that the new layer is to have.

    Returns:
        The FakeQuant class if a quantizer is among the transforms, else the Prunable class.

    Raises:
        KeyError: the layer's class has no row in `LAYERS`, or none with weights to quantize.
    """
    has_quantizer = any(isinstance(t, Quantizer) for each in transforms.values() for t in each)
    classes = FAKE_QUANT_LAYERS if has_quantizer else PRUNABLE_LAYERS
    return classes[supported_class(type(layer))]


class FakeQuant(CompressedLayer):
    """Mixin of the layers whose weights are quantized; 8-bit symmetric per channel by default."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.keras_class is not None:
            FAKE_QUANT_LAYERS[cls.keras_class] = cls

    def default_transforms(self):
        """One 8-bit symmetric narrow-range quantizer per weight and output channel."""
        spec = LAYERS[self.keras_class]
        return {
            weight: [SymmetricQuantizer(axis=spec.channel_axes(self, weight), narrow_range=True)]
            for weight in spec.weights
        }


class FakeQuantConv1D(FakeQuant, keras.layers.Conv1D):
    """`keras.layers.Conv1D` that convolves with fake-quantized weights."""


class FakeQuantConv2D(FakeQuant, keras.layers.Conv2D):
    """`keras.layers.Conv2D` that convolves with fake-quantized weights.

    Example:

    >>> layer = FakeQuantConv2D(8, 3, transforms={"kernel": [SymmetricQuantizer(bits=4)]})
    """


class FakeQuantConv3D(FakeQuant, keras.layers.Conv3D):
    """`keras.layers.Conv3D` that convolves with fake-quantized weights."""


class FakeQuantConv1DTranspose(FakeQuant, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` that convolves with fake-quantized weights."""


class FakeQuantConv2DTranspose(FakeQuant, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` that convolves with fake-quantized weights."""


class FakeQuantConv3DTranspose(FakeQuant, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` that convolves with fake-quantized weights."""


class FakeQuantDepthwiseConv1D(FakeQuant, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` that convolves with fake-quantized weights."""


class FakeQuantDepthwiseConv2D(FakeQuant, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` that convolves with fake-quantized weights."""


class FakeQuantSeparableConv1D(FakeQuant, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` with both kernels fake-quantized.

    `compress_model` splits separable convolutions instead, so that the tensor between the two
    halves is quantized too.
    """


class FakeQuantSeparableConv2D(FakeQuant, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with both kernels fake-quantized.

    `compress_model` splits separable convolutions instead, so that the tensor between the two
    halves is quantized too.
    """


class FakeQuantDense(FakeQuant, keras.layers.Dense):
    """`keras.layers.Dense` that multiplies by fake-quantized weights."""


class FakeQuantEinsumDense(FakeQuant, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` that multiplies by fake-quantized weights."""


class FakeQuantEmbedding(FakeQuant, keras.layers.Embedding):
    """`keras.layers.Embedding` that looks up fake-quantized vectors."""


class FakeQuantReversibleEmbedding(FakeQuant, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` with fake-quantized vectors in both directions."""


class FakeQuantSimpleRNN(RecurrentWeights, FakeQuant, keras.layers.SimpleRNN):
    """`keras.layers.SimpleRNN` with fake-quantized kernel and recurrent kernel."""


class FakeQuantGRU(RecurrentWeights, FakeQuant, keras.layers.GRU):
    """`keras.layers.GRU` with fake-quantized kernel and recurrent kernel."""


class FakeQuantLSTM(RecurrentWeights, FakeQuant, keras.layers.LSTM):
    """`keras.layers.LSTM` with fake-quantized kernel and recurrent kernel."""


def register_layer(cls, weights, integer=True):
    """Opt a layer class of your own in: its weights are then compressed like those of Keras' own.

    The class must read each weight by attribute in `call`, and be made again by its `get_config`.
    Call this before `compress_model`, and before a saved compressed model is loaded.

    Args:
        cls: subclass of `keras.layers.Layer`.
        weights: dict {attribute name of a weight: tuple of its output-channel axes, counted from
            the end}, such as `{"kernel": (-1,)}`; a function of the layer may give the axes.
        integer: whether the layer is a matrix product or a convolution of its (single) input and
            its weight, which an integer runtime computes in integers. False: the weights are
            rounded, the input is not.

    Returns:
        The compressed class, `FakeQuant<name of cls>`.

    Raises:
        TypeError: `cls` is no Keras layer class.
        ValueError: it is registered already, or `weights` is not as described.

    Example:

    >>> class Scale(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.factor = self.add_weight(shape=input_shape[-1:], name="factor")
    ...     def call(self, inputs):
    ...         return inputs * self.factor
    >>> register_layer(Scale, {"factor": (-1,)}, integer=False).__name__
    'FakeQuantScale'
    """
    add_row(cls, weights, integer)
    document = f"`{cls.__name__}` whose weights can be masked."
    type(f"Prunable{cls.__name__}", (Prunable, cls), {"__doc__": document})
    document = f"`{cls.__name__}` with fake-quantized weights."
    return type(f"FakeQuant{cls.__name__}", (FakeQuant, cls), {"__doc__": document})


def exclude_from_weight_decay(optimizer, variables):
    """Keep variables out of an optimizer's weight decay, beside those that the user excluded."""
    excluded = getattr(optimizer, "_exclude_from_weight_decay", set())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    optimizer.exclude_from_weight_decay(var_list=variables)
    optimizer._exclude_from_weight_decay |= excluded
    optimizer._exclude_from_weight_decay_pattern = pattern


@keras.saving.register_keras_serializable(PACKAGE)
class FakeQuantize(keras.layers.Layer):
    """Rounds a tensor to the grid of its quantizer: the activation quantizer on a graph edge.

    Shape: any, the same out as in, and the same dtype. The arithmetic runs in float32 under every
    dtype policy, on the tensor as it comes: a float32 input of a model with a mixed policy is
    rounded once, to the grid that its export has.

    Called on several tensors (a shared layer), it gives all of them one scale.

    Args:
        quantizer: a `Quantizer`. None: `SymmetricQuantizer()`.
    """

    def __init__(self, quantizer=None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.quantizer = SymmetricQuantizer() if quantizer is None else revived(quantizer)
        self.supports_masking = True

    def build(self, input_shape):
        if not self.quantizer.built:
            self.quantizer.build(tuple(input_shape))

    def call(self, inputs, training=None):
        outputs = self.quantizer(keras.ops.cast(inputs, "float32"), training=training)
        return keras.ops.cast(outputs, inputs.dtype)

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        quantizer = serialized(self.quantizer)
        return super().get_config() | {"quantizer": quantizer}
