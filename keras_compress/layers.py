"""Compressed layers: the user's own Keras layer class, reading its weights through transforms.

A compressed layer is `class FakeQuantConv2D(CompressedLayer, keras.layers.Conv2D)`. Every Keras
layer reads its weights by attribute inside `call`, so one property per weight is enough:

    layer.kernel == transform_n(... transform_1(raw kernel))

The raw (latent) weight is what the optimizer trains and what is saved. `layer_specs.LAYERS` has
one row per supported Keras class; a new layer type is one row and its short class.
"""

import contextlib
import inspect

import keras
import numpy as np
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope

from keras_compress.layer_specs import LAYERS, add_row, supported_class
from keras_compress.quantizers import Quantizer, SymmetricQuantizer
from keras_compress.ranges import Observer
from keras_compress.transforms import Transform

PACKAGE = "keras_compress"


FAKE_QUANT_LAYERS = {}  # Keras layer class -> its FakeQuant class, filled by subclassing


def layer_spec(layer):
    """Return the `LayerSpec` of a layer, or None where its class (or base class) has no row.

    A user's subclass of a supported layer is matched where it adds no method: its `call` may do
    something else.
    """
    if isinstance(layer, CompressedLayer):
        return LAYERS[layer.keras_class]
    return LAYERS.get(supported_class(type(layer)))


def compressed_class(layer):
    """Return the compressed class that takes the place of a plain Keras layer.

    Raises:
        KeyError: the layer's class has no row in `LAYERS`.
    """
    return FAKE_QUANT_LAYERS[supported_class(type(layer))]


def clone_layer(layer, name):
    """Return a fresh layer of the same configuration, without weights.

    Raises:
        ValueError: the layer cannot be made again from its configuration.
    """
    try:
        config = layer.get_config() | {"name": name}
        if isinstance(layer, keras.layers.Lambda):
            # Its functions may not survive serialization, and have no need to.
            functions = ("function", "mask", "arguments", "_output_shape")
            config |= {key.lstrip("_"): getattr(layer, key) for key in functions}
            return type(layer)(**config)
        if type(layer).from_config.__func__ is keras.layers.Layer.from_config.__func__:
            config = _accepted(type(layer), config)
        twin = type(layer).from_config(config)
    except Exception as error:  # whatever a user's `get_config` or constructor may raise
        raise ValueError(
            f"Layer '{name}' ({type(layer).__name__}) cannot be copied: expected that "
            "`from_config(get_config())` makes it again. Give it a `get_config` with every "
            f"argument of its constructor. Received: {type(error).__name__}: {error}"
        ) from error
    twin.name = name
    return twin


def _accepted(cls, config):
    """Leave out what a constructor without `**kwargs` does not take: name, dtype, trainable."""
    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return config
    return {key: value for key, value in config.items() if key in parameters}


class CompressedLayer:
    """Mixin placed before a Keras layer class; reads that layer's weights through transforms.

    Args:
        transforms: dict `{weight attribute: list of Transform}`, applied in order, e.g.
            `{"kernel": [SymmetricQuantizer(bits=8, axis=(-1,))]}`. None: `default_transforms()`.
        **kwargs: the arguments of the Keras layer.

    Invariants: `layer(x) == plain_layer(x)` where `plain_layer` is the Keras layer holding
    `layer.effective_weight(name)`; the saved file holds the raw weights.
    """

    keras_class = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.keras_class = next((base for base in cls.__mro__ if base in LAYERS), None)
        if cls.keras_class is None:
            return  # a further mixin, not a layer yet
        for weight in LAYERS[cls.keras_class].weights:
            setattr(cls, weight, _effective_weight_property(weight))
        keras.saving.register_keras_serializable(PACKAGE)(cls)

    def __init__(self, *args, transforms=None, **kwargs):
        super().__init__(*args, **kwargs)
        names = list(LAYERS[self.keras_class].weights)
        transforms = self.default_transforms() if transforms is None else transforms
        unknown = sorted(set(transforms) - set(names))
        if unknown:
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) has the weights {names}. "
                f"Received transforms for: {unknown}"
            )
        for name in names:
            setattr(self, f"{name}_transforms", [_revive(t) for t in transforms.get(name, ())])

    def default_transforms(self):
        """Transforms of a layer made by hand without any: none."""
        return {}

    @property
    def weight_names(self):
        """Attribute names of the weights that can carry transforms."""
        return list(LAYERS[self.keras_class].weights)

    def transforms_of(self, weight):
        """Return the list of transforms of a weight."""
        return getattr(self, f"{weight}_transforms")

    def raw_weight(self, weight):
        """Return the latent variable behind a weight: what the optimizer trains."""
        return getattr(self, f"_{weight}")

    def effective_weight(self, weight):
        """Return the weight as `call` uses it, a NumPy array in float32."""
        value = self._transformed(weight)
        return np.asarray(keras.ops.convert_to_numpy(value))

    @property
    def plain_weights(self):
        """The variables that the Keras layer has without transforms, in its order."""
        names = self.weight_names
        states = {id(v) for name in names for t in self.transforms_of(name) for v in t.weights}
        return [variable for variable in self.weights if id(variable) not in states]

    def plain_values(self):
        """NumPy values for the plain Keras layer: effective where there are transforms."""
        effective = {
            id(self.raw_weight(name)): name
            for name in self.weight_names
            if self.transforms_of(name)
        }
        return [
            self.effective_weight(effective[id(v)]) if id(v) in effective else v.numpy()
            for v in self.plain_weights
        ]

    def _transformed(self, weight):
        self._initialize_missing_ranges()
        value = self.raw_weight(weight)
        for transform in self.transforms_of(weight):
            value = transform(value)
        return value

    def add_weight(self, *args, name=None, **kwargs):
        # Transforms compute in float32: under a mixed policy the raw weight must not arrive
        # rounded to half precision.
        if name in self.weight_names and self.transforms_of(name):
            kwargs["autocast"] = False
        return super().add_weight(*args, name=name, **kwargs)

    def build(self, input_shape=None):
        super().build(input_shape)
        self._build_transforms()

    def _build_transforms(self):
        for weight in self.weight_names:
            for transform in self.transforms_of(weight):
                if not transform.built:
                    transform.build(tuple(self.raw_weight(weight).shape))
        self._initialize_missing_ranges()

    def _initialize_missing_ranges(self):
        """Set ranges that are not set yet, as soon as the weights have values.

        A layer inside a subclassed model is built symbolically, before its variables exist.
        """
        transforms = [t for name in self.weight_names for t in self.transforms_of(name)]
        if all(t.calibrated for t in transforms if isinstance(t, Quantizer)):
            return
        weights = [self.raw_weight(name) for name in self.weight_names]
        if in_stateless_scope():
            # A scope that holds values is a step of training on JAX, where ranges cannot be set.
            if any(
                get_stateless_scope().get_current_value(weight) is not None for weight in weights
            ):
                raise ValueError(
                    f"Layer '{self.name}' has quantizers without a range. Call the model on a "
                    "batch once before it is trained or traced."
                )
            return
        if any(weight._value is None for weight in weights):
            return
        with _outside_of_graphs():
            self.initialize_ranges()

    def initialize_ranges(self, make_observer=Observer, force=False):
        """Set the range of the weight quantizers from the weights that reach them.

        Args:
            make_observer: function that gives a fresh `Observer`, called with `axis=`.
            force: whether ranges that are set already are set anew.
        """
        for weight in self.weight_names:
            for quantizer in self.transforms_of(weight):
                if isinstance(quantizer, Quantizer) and (force or not quantizer.calibrated):
                    with _outside_of_graphs():
                        observer = make_observer(axis=quantizer.axis)
                        observer.update(self.raw_weight(weight).numpy()[None])
                        low, high = observer.result()
                        shape = quantizer.variable_shape(self.raw_weight(weight).shape)
                        quantizer.set_range(low.reshape(shape), high.reshape(shape))

    # Conv and Dense save what their `kernel` property returns, which is the transformed weight.
    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def quantize(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' is already compressed: Keras' own post-training `quantize` "
            "would rewrite its weights. Call it on the plain model of `keras_compress.strip`."
        )

    def get_config(self):
        transforms = {
            weight: [keras.saving.serialize_keras_object(t) for t in self.transforms_of(weight)]
            for weight in self.weight_names
            if self.transforms_of(weight)
        }
        return super().get_config() | {"transforms": transforms}


def _outside_of_graphs():
    """Context in which variables can be read: a layer may be built while TensorFlow traces."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def _revive(transform):
    if isinstance(transform, dict):
        transform = keras.saving.deserialize_keras_object(transform)
    if not isinstance(transform, Transform):
        raise TypeError(
            "Expected a Transform, such as `SymmetricQuantizer(bits=8)`. "
            f"Received: {transform!r} (of type {type(transform).__name__})"
        )
    return transform


def _effective_weight_property(weight):
    raw = f"_{weight}"

    def read(self):
        try:
            raw_weight = self.raw_weight(weight)
        except AttributeError:
            raise AttributeError(
                f"Layer '{self.name}' must be built before `{weight}` is read."
            ) from None
        if not self.transforms_of(weight):
            return raw_weight
        return keras.ops.cast(self._transformed(weight), self.compute_dtype)

    def write(self, value):
        setattr(self, raw, value)

    return property(read, write, doc=f"Effective {weight}: the raw one through its transforms.")


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


class FakeQuantRecurrent(FakeQuant):
    """Mixin of the recurrent layers: the weights are those of the layer's cell.

    They pass through their transforms once per call, not once per time step.
    """

    def raw_weight(self, weight):
        """Return the latent variable behind a weight of the cell."""
        return LAYERS[self.keras_class].read(self, weight)

    def build(self, sequences_shape, initial_state_shape=None):
        super(FakeQuant, self).build(sequences_shape)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        weights = {name: getattr(self, name) for name in self.weight_names}
        with _reading(self.cell, weights):
            return super().call(
                sequences, initial_state=initial_state, mask=mask, training=training
            )

    def _build_transforms(self):
        for weight in self.weight_names:
            if self.transforms_of(weight):
                self.raw_weight(weight)._autocast = False  # as `add_weight` does for other layers
        super()._build_transforms()


@contextlib.contextmanager
def _reading(cell, weights):
    """Let a cell read the given tensors in place of its variables."""
    variables = {name: vars(cell)[name] for name in weights}
    vars(cell).update(weights)
    try:
        yield
    finally:
        vars(cell).update(variables)


class FakeQuantSimpleRNN(FakeQuantRecurrent, keras.layers.SimpleRNN):
    """`keras.layers.SimpleRNN` with fake-quantized kernel and recurrent kernel."""


class FakeQuantGRU(FakeQuantRecurrent, keras.layers.GRU):
    """`keras.layers.GRU` with fake-quantized kernel and recurrent kernel."""


class FakeQuantLSTM(FakeQuantRecurrent, keras.layers.LSTM):
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

    Shape: any, the same out as in. The arithmetic runs in float32 under every dtype policy.
    Called on several tensors (a shared layer), it gives all of them one scale.

    Args:
        quantizer: a `Quantizer`. None: `SymmetricQuantizer()`.
    """

    def __init__(self, quantizer=None, **kwargs):
        super().__init__(**kwargs)
        self.quantizer = SymmetricQuantizer() if quantizer is None else _revive(quantizer)
        self.supports_masking = True

    def build(self, input_shape):
        if not self.quantizer.built:
            self.quantizer.build(tuple(input_shape))

    def call(self, inputs, training=None):
        outputs = self.quantizer(keras.ops.cast(inputs, "float32"), training=training)
        return keras.ops.cast(outputs, inputs.dtype)

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        quantizer = keras.saving.serialize_keras_object(self.quantizer)
        return super().get_config() | {"quantizer": quantizer}
