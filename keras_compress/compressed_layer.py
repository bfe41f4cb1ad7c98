"""Compressed layers: the user's own Keras layer class, reading its weights through transforms.

A compressed layer is `class FakeQuantConv2D(CompressedLayer, keras.layers.Conv2D)`. Every Keras
layer reads its weights by attribute inside `call`, so one property per weight is enough:

    layer.kernel == transform_n(... transform_1(raw kernel))

The raw (latent) weight is what the optimizer trains and what is saved. `layer_specs.LAYERS` has
one row per supported Keras class; `layers.py` and `prunable_layers.py` have the classes.
"""

import contextlib
import inspect
import types

import keras
import numpy as np
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope

from keras_compress.layer_specs import LAYERS, supported_class
from keras_compress.quantizers import Quantizer
from keras_compress.ranges import Observer
from keras_compress.replicas import laid_out_like
from keras_compress.transforms import Transform

PACKAGE = "keras_compress"


def layer_spec(layer):
    """Return the `LayerSpec` of a layer, or None where its class (or base class) has no row.

    A user's subclass of a supported layer is matched where it adds no method: its `call` may do
    something else.
    """
    if isinstance(layer, CompressedLayer):
        return LAYERS[layer.keras_class]
    return LAYERS.get(supported_class(type(layer)))


def require_finite(layer, weight, values):
    """Raise a ValueError where values that belong to a weight of a layer are NaN or infinite."""
    strange = values.size - np.count_nonzero(np.isfinite(values))
    if strange:
        raise ValueError(
            f"Expected finite numbers. Received: {strange} of the {values.size} values of "
            f"'{weight}' of layer '{layer.name}' are NaN or infinite, as after a training that "
            "diverged. Take an earlier state of the model, and train with a lower learning rate "
            "or clipped gradients."
        )


def is_weighted(layer):
    """Whether a layer multiplies by, or looks up, weights that quantization takes."""
    spec = layer_spec(layer)
    return spec is not None and bool(spec.weights)


def clone_layer(layer, name, changed=types.MappingProxyType({})):
    """Return a fresh layer of the same configuration, without weights.

    Args:
        layer: the layer.
        name: name of the new one.
        changed: dict of constructor arguments that differ.

    Raises:
        ValueError: the layer cannot be made again from its configuration.
    """
    try:
        config = layer.get_config() | {"name": name} | dict(changed)
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


def set_range_from(quantizer, values, observer):
    """Set the range of a weight quantizer from a weight, a NumPy array, by a fresh `Observer`."""
    observer.update(values[None])
    low, high = observer.result()
    shape = quantizer.variable_shape(values.shape)
    quantizer.set_range(low.reshape(shape), high.reshape(shape))


def _plain_observer(quantizer):
    return Observer(axis=quantizer.axis)


class CompressedLayer:
    """Mixin placed before a Keras layer class; reads that layer's weights through transforms.

    Args:
        transforms: dict `{weight attribute: list of Transform}`, applied in order, e.g.
            `{"kernel": [SymmetricQuantizer(bits=8, axis=(-1,))]}`. None: `default_transforms()`.
            Masks may sit on any weight of the layer's row, quantizers not on its `vectors`.
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
        for weight in LAYERS[cls.keras_class].names:
            setattr(cls, weight, _effective_weight_property(weight))
        keras.saving.register_keras_serializable(PACKAGE)(cls)

    def __init__(self, *args, transforms=None, **kwargs):
        super().__init__(*args, **kwargs)
        names = self.weight_names
        transforms = self.default_transforms() if transforms is None else transforms
        unknown = sorted(set(transforms) - set(names))
        if unknown:
            raise ValueError(
                f"Layer '{self.name}' ({type(self).__name__}) has the weights {names}. "
                f"Received transforms for: {unknown}"
            )
        self._read_in_float32 = frozenset()
        for name in names:
            setattr(self, f"{name}_transforms", [revived(t) for t in transforms.get(name, ())])
        for name in LAYERS[self.keras_class].vectors:
            if any(isinstance(t, Quantizer) for t in self.transforms_of(name)):
                raise ValueError(
                    f"Layer '{self.name}' ({type(self).__name__}): `{name}` may carry masks only. "
                    f"Received a quantizer for: {name}"
                )

    def default_transforms(self):
        """Transforms of a layer made by hand without any: none."""
        return {}

    @property
    def weight_names(self):
        """Attribute names of the weights that can carry transforms, vectors such as biases too."""
        return list(LAYERS[self.keras_class].names)

    @property
    def _transformed_names(self):
        return [name for name in self.weight_names if self.transforms_of(name)]

    def transforms_of(self, weight):
        """Return the list of transforms of a weight."""
        return getattr(self, f"{weight}_transforms")

    def raw_weight(self, weight):
        """Return the latent variable behind a weight: what the optimizer trains.

        None where the layer has no such weight: its bias without `use_bias`.
        """
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
        effective = {id(self.raw_weight(name)): name for name in self._transformed_names}
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

    def add_weight(self, *args, name=None, autocast=True, **kwargs):
        # Transforms compute in float32: under a mixed policy the raw weight must not arrive
        # rounded to half precision. What they give is rounded, where Keras rounds the weight.
        if name in self.weight_names and self.transforms_of(name):
            self._read_in_float32 |= frozenset() if autocast else {name}
            autocast = False
        return super().add_weight(*args, name=name, autocast=autocast, **kwargs)

    def build(self, input_shape=None):
        super().build(input_shape)
        self._build_transforms()

    def _build_transforms(self):
        for weight in self._transformed_names:
            if self.raw_weight(weight) is None:
                raise ValueError(
                    f"Layer '{self.name}' ({type(self).__name__}) has no {weight} by its "
                    f"configuration. Received transforms for: {[weight]}"
                )
            for transform in self.transforms_of(weight):
                if not transform.built:
                    with laid_out_like(self.raw_weight(weight)):
                        transform.build(tuple(self.raw_weight(weight).shape))
        self._initialize_missing_ranges()

    def _initialize_missing_ranges(self):
        """Set ranges that are not set yet, as soon as the weights have values.

        A layer inside a subclassed model is built symbolically, before its variables exist.
        """
        transforms = [t for name in self._transformed_names for t in self.transforms_of(name)]
        if all(t.calibrated for t in transforms if isinstance(t, Quantizer)):
            return
        weights = [self.raw_weight(name) for name in self._transformed_names]
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

    def initialize_ranges(self, make_observer=_plain_observer, force=False):
        """Set the range of the weight quantizers from the weights that reach them.

        Args:
            make_observer: function of a quantizer that gives a fresh `Observer` for it.
            force: whether ranges that are set already are set anew.
        """
        for weight in self.weight_names:
            for quantizer in self.transforms_of(weight):
                if isinstance(quantizer, Quantizer) and (force or not quantizer.calibrated):
                    with _outside_of_graphs():
                        values = self.raw_weight(weight).numpy()
                        set_range_from(quantizer, values, make_observer(quantizer))

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
            weight: [serialized(transform) for transform in self.transforms_of(weight)]
            for weight in self._transformed_names
        }
        return super().get_config() | {"transforms": transforms}


def serialized(transform):
    """Return the configuration of a transform without a shape: it is built with what it sits on."""
    config = keras.saving.serialize_keras_object(transform)
    config.pop("build_config", None)
    return config


def _outside_of_graphs():
    """Context in which variables can be read: a layer may be built while TensorFlow traces."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def revived(transform):
    """Return a `Transform`, made from its serialized form where it is one.

    Raises:
        TypeError: it is neither.
    """
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
        if raw_weight is None or not self.transforms_of(weight):
            return raw_weight
        value = self._transformed(weight)
        dtype = value.dtype if weight in self._read_in_float32 else self.compute_dtype
        return keras.ops.cast(value, dtype)

    def write(self, value):
        setattr(self, raw, value)

    return property(read, write, doc=f"Effective {weight}: the raw one through its transforms.")


class RecurrentWeights(CompressedLayer):
    """Mixin of the recurrent layers: the weights are those of the layer's cell.

    They pass through their transforms once per call, not once per time step.
    """

    def raw_weight(self, weight):
        """Return the latent variable behind a weight of the cell."""
        return LAYERS[self.keras_class].read(self, weight)

    def build(self, sequences_shape, initial_state_shape=None):
        super().build(sequences_shape)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        weights = {name: getattr(self, name) for name in self._transformed_names}
        with _reading(self.cell, weights):
            return super().call(
                sequences, initial_state=initial_state, mask=mask, training=training
            )

    def _build_transforms(self):
        for weight in self._transformed_names:
            if self.raw_weight(weight) is not None:
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
