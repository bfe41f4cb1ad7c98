"""Layers that stand for what tracing finds inside a layer beside layers and operations."""

import keras

from keras_compress.compressed_layer import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class Parameter(keras.layers.Layer):
    """A variable that a traced layer holds itself, such as a class token: `layer(any) == value`.

    Shape: any in, that of the variable out. The input only ties it to a model's graph.

    Args:
        value_shape: shape of the variable.
    """

    def __init__(self, value_shape, **kwargs):
        super().__init__(**kwargs)
        self.value_shape = tuple(value_shape)

    def build(self, input_shape):
        self.value = self.add_weight(shape=self.value_shape, initializer="zeros", name="value")

    def call(self, inputs):
        return keras.ops.convert_to_tensor(self.value)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(self.value_shape, dtype=self.compute_dtype)

    def compute_mask(self, inputs, previous_mask):
        return None

    def get_config(self):
        return super().get_config() | {"value_shape": self.value_shape}


@keras.saving.register_keras_serializable(PACKAGE)
class ReadMask(keras.layers.Layer):
    """The implicit mask of a tensor as a tensor: `layer(x)` is the mask that Keras carries with x.

    Shape: that of the mask, usually the first two axes of the input; dtype bool.
    """

    def call(self, inputs, mask=None):
        return keras.ops.cast(mask, "bool")

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(mask.shape, dtype="bool")

    def compute_mask(self, inputs, previous_mask):
        return None


@keras.saving.register_keras_serializable(PACKAGE)
class SetMask(keras.layers.Layer):
    """The input with another implicit mask: `layer(x, mask)`, or with none.

    Tracing takes composite layers apart; what they do to the masks that Keras carries beside the
    tensors is put back by this layer. Shape: that of the input.

    Args:
        drop: whether the result has no mask.
    """

    def __init__(self, drop=False, **kwargs):
        super().__init__(**kwargs)
        self.drop = drop

    def call(self, inputs, mask=None):
        return keras.ops.copy(inputs)

    def compute_mask(self, inputs, previous_mask):
        return None if self.drop else previous_mask

    def get_config(self):
        return super().get_config() | {"drop": self.drop}


@keras.saving.register_keras_serializable(PACKAGE)
class CausalMask(keras.layers.Layer):
    """Which keys each query may see: `layer(query, key)[0, i, j] = (j <= i)`.

    Shape: `(batch, queries, ...)` and `(batch, keys, ...)` in, `(1, queries, keys)` out.
    """

    def call(self, query, key):
        queries = keras.ops.arange(keras.ops.shape(query)[1])
        keys = keras.ops.arange(keras.ops.shape(key)[1])
        return keras.ops.expand_dims(queries, 1)[None] >= keys

    def compute_output_spec(self, query, key):
        return keras.KerasTensor((1, query.shape[1], key.shape[1]), dtype="bool")

    def compute_mask(self, inputs, previous_mask):
        return None


@keras.saving.register_keras_serializable(PACKAGE)
class BatchSized(keras.layers.Layer):
    """An operation that needs the size of the batch: `ops.tile(x, (batch, 1, 1))` and the like.

    Called on `(x, like)`; `like` is any tensor with the batch as its first axis.

    Args:
        function: name of the function in `keras.ops`.
        sized: name of its argument that holds the size.
        size: value of that argument, None in the place of the size of the batch.
        arguments: dict of further arguments.

    Example:

    >>> layer = BatchSized("tile", "repeats", (None, 1))
    >>> layer(keras.ops.ones((1, 2)), keras.ops.ones((3, 5))).shape == (3, 2)
    True
    """

    def __init__(self, function, sized, size, arguments=None, **kwargs):
        super().__init__(**kwargs)
        self.function = function
        self.sized = sized
        self.size = tuple(size) if isinstance(size, (list, tuple)) else size
        self.arguments = dict(arguments or {})

    @property
    def operation(self):
        """Class name of the operation: `BroadcastTo` of `broadcast_to`."""
        return "".join(word.title() for word in self.function.split("_"))

    def call(self, inputs, like):
        batch = keras.ops.shape(like)[0]
        size = keras.tree.map_structure(lambda n: batch if n is None else n, self.size)
        function = getattr(keras.ops, self.function)
        return function(inputs, **{self.sized: size}, **self.arguments)

    def compute_mask(self, inputs, previous_mask):
        return None

    def get_config(self):
        own = {"function": self.function, "sized": self.sized, "size": self.size}
        return super().get_config() | own | {"arguments": self.arguments}
