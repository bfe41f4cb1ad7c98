"""Transforms: Keras layers from tensor to tensor of one shape, applied to weights and edges."""

import keras

TRANSFORMS = {}  # class name -> concrete Transform class, filled by subclassing


class Transform(keras.layers.Layer):
    """A tensor-to-tensor layer that owns its state: a mask, a quantizer.

    Shapes: any in, the same out. A transform knows nothing of the layer or edge it sits on. It
    computes in float32 under every dtype policy; whoever calls it casts the result back.

    Subclassing registers a class for serialization and in `TRANSFORMS`, over which the contract
    tests run. A base class that is not to be used itself says `abstract=True`:

    >>> class Negate(Transform):
    ...     def call(self, inputs, training=None):
    ...         return -inputs
    >>> TRANSFORMS["Negate"] is Negate
    True
    """

    def __init_subclass__(cls, abstract=False, **kwargs):
        super().__init_subclass__(**kwargs)
        if not abstract:
            keras.saving.register_keras_serializable("keras_compress")(cls)
            TRANSFORMS[cls.__name__] = cls

    def __init__(self, **kwargs):
        super().__init__(**{"dtype": "float32"} | kwargs)
        if self.compute_dtype != "float32" or self.variable_dtype != "float32":
            raise ValueError(
                f"{type(self).__name__} computes in float32 under every dtype policy; cast around "
                f"it instead. Received: dtype={kwargs['dtype']!r}"
            )
        self.supports_masking = True

    @property
    def undecayed_variables(self):
        """Trained variables that weight decay must not touch, a list."""
        return []

    def state_axes(self, variable):
        """Return the axes of the input that the axes of a state variable belong to.

        Counted from the end; an axis of size 1 holds for all positions of the input's. States are
        cut along with the input where channels are taken out.
        """
        return tuple(range(-len(variable.shape), 0))

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
