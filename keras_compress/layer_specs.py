"""The table of layers whose weights can be compressed: one row per Keras class.

A row says which attributes hold weights and which of their axes are output channels.
"""

import dataclasses
import types
from collections.abc import Callable

import keras


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What compression needs to know about a Keras layer class.

    Attributes:
        weights: {weight attribute: output-channel axes, counted from the end}, or a function of
            the layer that returns the axes where they depend on its configuration. Empty: the
            layer has none to multiply by, as those that normalize.
        vectors: attributes of further weights, which may carry masks but are never quantized. An
            attribute may be None: the bias of a layer without.
        integer: whether it computes in integers when weights and inputs are quantized.
        integer_call: function `(layer, keyword arguments of a call) -> bool`: whether a call
            computes in integers although others do not.
        integer_axes: the `weights` of a layer that such a call is made of.
        reason: why it does not, where the plan is to say so.
        holder: attribute of the layer that holds the weights, "" for the layer itself.
    """

    weights: types.MappingProxyType
    vectors: tuple[str, ...] = ()
    integer: bool = True
    integer_call: Callable | None = None
    integer_axes: types.MappingProxyType = dataclasses.field(
        default_factory=lambda: types.MappingProxyType({})
    )
    reason: str = ""
    holder: str = ""

    @property
    def names(self):
        """Attributes that may carry transforms: `weights`, then `vectors`."""
        return (*self.weights, *self.vectors)

    def channel_axes(self, layer, weight, is_integer_product=False):
        """Return the output-channel axes of `weight` as a tuple of negative ints."""
        axes = self.weights[weight]
        if is_integer_product:
            axes = self.integer_axes.get(weight, axes)
        return axes(layer) if callable(axes) else axes

    def computes_in_integers(self, layer, arguments):
        """Whether a call with keyword arguments does when weights and inputs are quantized."""
        return self.integer or bool(self.integer_call and self.integer_call(layer, arguments))

    def read(self, layer, weight):
        """Return a weight as the layer computes with it."""
        return getattr(getattr(layer, self.holder) if self.holder else layer, weight)


CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)

LOOP = "its weights are stored as integers; OpenVINO computes the loop over time steps in float"

UNTIED = "it multiplies by weights of its own, not by the embeddings: they stay float"


def _row(**weights):
    return LayerSpec(types.MappingProxyType(weights), ("bias",))


def _normalization_row(*vectors):
    return LayerSpec(types.MappingProxyType({}), vectors, integer=False)


def _recurrent_row():
    weights = {"kernel": (-1,), "recurrent_kernel": (-1,)}
    weights = types.MappingProxyType(weights)
    return LayerSpec(weights, ("bias",), integer=False, reason=LOOP, holder="cell")


def _lookup_row():
    return LayerSpec(types.MappingProxyType({"embeddings": (-1,)}), integer=False)


def _reversible_row():
    """Looked up, every number of a vector has a scale; multiplied by, every vector has one."""
    return dataclasses.replace(
        _lookup_row(),
        integer_call=_is_tied_product,
        integer_axes=types.MappingProxyType({"embeddings": (-2,)}),
        reason=UNTIED,
    )


def _is_tied_product(layer, arguments):
    return layer.tie_weights and arguments.get("reverse", False)


def _einsum_output_axes(layer):
    """Return the kernel axes of an `EinsumDense` that are not summed over."""
    operands, _, output = layer.equation.replace(" ", "").partition("->")
    kernel = operands.split(",")[1].replace("...", "")
    return tuple(i - len(kernel) for i, label in enumerate(kernel) if label in output)


LAYERS = {
    keras.layers.Conv1D: _row(kernel=(-1,)),
    keras.layers.Conv2D: _row(kernel=(-1,)),
    keras.layers.Conv3D: _row(kernel=(-1,)),
    keras.layers.Conv1DTranspose: _row(kernel=(-2,)),
    keras.layers.Conv2DTranspose: _row(kernel=(-2,)),
    keras.layers.Conv3DTranspose: _row(kernel=(-2,)),
    keras.layers.DepthwiseConv1D: _row(kernel=(-2, -1)),
    keras.layers.DepthwiseConv2D: _row(kernel=(-2, -1)),
    keras.layers.SeparableConv1D: _row(depthwise_kernel=(-2, -1), pointwise_kernel=(-1,)),
    keras.layers.SeparableConv2D: _row(depthwise_kernel=(-2, -1), pointwise_kernel=(-1,)),
    keras.layers.Dense: _row(kernel=(-1,)),
    keras.layers.EinsumDense: _row(kernel=_einsum_output_axes),
    keras.layers.Embedding: _lookup_row(),
    keras.layers.ReversibleEmbedding: _reversible_row(),
    keras.layers.SimpleRNN: _recurrent_row(),
    keras.layers.GRU: _recurrent_row(),
    keras.layers.LSTM: _recurrent_row(),
    keras.layers.BatchNormalization: _normalization_row("gamma", "beta"),
    keras.layers.LayerNormalization: _normalization_row("gamma", "beta"),
    keras.layers.GroupNormalization: _normalization_row("gamma", "beta"),
    keras.layers.RMSNormalization: _normalization_row("scale"),
}


def supported_class(cls):
    """Return the class with a row that a layer class is or adds no method to, or None."""
    while cls not in LAYERS:
        if any(map(callable, vars(cls).values())):
            return None
        (cls,) = cls.__bases__ if len(cls.__bases__) == 1 else (object,)
    return cls


def add_row(cls, weights, integer=True):
    """Add the row of a layer class of the user's; see `keras_compress.register_layer`.

    Raises:
        TypeError: `cls` is no Keras layer class.
        ValueError: the class has a row already, or `weights` is not as described.
    """
    if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
        raise TypeError(f"Expected a subclass of `keras.layers.Layer`. Received: cls={cls!r}")
    if cls in LAYERS:
        raise ValueError(f"Layer class {cls.__name__} is registered already.")
    if not isinstance(weights, dict) or not weights or not all(map(_are_axes, weights.values())):
        raise ValueError(
            "Expected a dict {attribute name of a weight: its output-channel axes, counted from "
            f"the end}}, such as {{'kernel': (-1,)}}. Received: weights={weights!r}"
        )
    LAYERS[cls] = LayerSpec(types.MappingProxyType(dict(weights)), integer=integer)


def _are_axes(axes):
    if callable(axes):
        return True
    return isinstance(axes, tuple) and all(isinstance(i, int) and i < 0 for i in axes)
