"""What composite operations do, in primitives: each function records it on symbolic tensors."""

import inspect

import keras
from keras import ops

from keras_compress.graph.traced_layers import CausalMask

LARGE_NEGATIVE = -0.7 * 3.4028235e38  # what Keras gives masked scores: 0.7 of float32's lowest


def unwrapped(op, inputs, is_masked=False):
    """Return (outputs of a wrapper's inner layers or None, reason for keeping it whole).

    Args:
        op: a layer of one of the classes `WRAPPERS`.
        inputs: symbolic tensor.
        is_masked: whether it carries an implicit mask.
    """
    wrapper = next(cls for cls in WRAPPERS if isinstance(op, cls))
    return WRAPPERS[wrapper](op, inputs, is_masked)


def _over_time(op, inputs, is_masked):
    """Give the time steps of a `TimeDistributed` to its inner layer as samples."""
    if isinstance(op.layer, keras.layers.Dense):
        return op.layer(inputs), ""
    if is_masked and _reads_masks(op.layer):
        return None, "gives each time step its part of an implicit mask"
    if None in inputs.shape[1:]:
        return None, f"its input has axes of unknown length: {inputs.shape}"
    steps = op.layer(ops.reshape(inputs, (-1, *inputs.shape[2:])))
    return ops.reshape(steps, (-1, inputs.shape[1], *steps.shape[1:])), ""


def _both_ways(op, inputs, is_masked):
    """Call the two layers of a `Bidirectional` and merge as it does."""
    if op.return_state:
        return None, "returns its states"
    forward, backward = op.forward_layer(inputs), op.backward_layer(inputs)
    if op.return_sequences:
        backward = ops.flip(backward, axis=1)
    merge = {
        "concat": lambda: ops.concatenate([forward, backward], axis=-1),
        "sum": lambda: forward + backward,
        "ave": lambda: (forward + backward) / 2,
        "mul": lambda: forward * backward,
        None: lambda: (forward, backward),
    }
    return merge[op.merge_mode](), ""


WRAPPERS = {keras.layers.TimeDistributed: _over_time, keras.layers.Bidirectional: _both_ways}


def _reads_masks(layer):
    """Whether the `call` of a layer takes masks."""
    return any(name.endswith("mask") for name in inspect.signature(layer.call).parameters)


def is_attention(op):
    """Whether an operation is `keras.ops.dot_product_attention` in a form that `attention` has."""
    return type(op).__name__ == "DotProductAttention" and op.attn_logits_soft_cap is None


def attention(query, key, value, bias=None, mask=None, scale=None, is_causal=False):
    """Return what `keras.ops.dot_product_attention` computes, as two matrix products.

    Shapes: query `(batch, queries, heads, size)`, key and value `(batch, keys, heads, size)`,
    bias and mask broadcast with `(batch, heads, queries, keys)`.
    """
    if is_causal:
        causal = CausalMask(name="causal_mask")(query, key)[:, None]
        mask = causal if mask is None else ops.logical_and(mask, causal)
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
    query, value = (ops.transpose(x, (0, 2, 1, 3)) for x in (query, value))
    scores = ops.matmul(query, ops.transpose(key, (0, 2, 3, 1)))
    scores = scores * (key.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = ops.where(mask, scores, LARGE_NEGATIVE)
    products = ops.matmul(ops.softmax(scores, axis=-1), value)
    return ops.transpose(products, (0, 2, 1, 3))


SEPARABLE_LAYERS = {
    keras.layers.SeparableConv1D: (keras.layers.DepthwiseConv1D, keras.layers.Conv1D),
    keras.layers.SeparableConv2D: (keras.layers.DepthwiseConv2D, keras.layers.Conv2D),
}


def split_separable(layer, name):
    """Return (depthwise, pointwise) layers that compute what a separable convolution computes."""
    depthwise_class, pointwise_class = SEPARABLE_LAYERS[type(layer)]
    shared = {"data_format": layer.data_format, "dtype": layer.dtype_policy}
    depthwise = depthwise_class(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
        name=f"{name}-depthwise",
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        **shared,
    )
    pointwise = pointwise_class(
        layer.filters,
        1,
        padding=layer.padding,
        use_bias=layer.use_bias,
        activation=layer.activation,
        name=f"{name}-pointwise",
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        activity_regularizer=layer.activity_regularizer,
        trainable=layer.trainable,
        **shared,
    )
    channel_axis = -1 if layer.data_format == "channels_last" else 1
    shape = [None] * (layer.rank + 2)
    shape[channel_axis] = layer.input_spec.axes[channel_axis]
    depthwise.build(tuple(shape))
    shape[channel_axis] *= layer.depth_multiplier
    pointwise.build(tuple(shape))
    depthwise.kernel.assign(keras.ops.convert_to_numpy(layer.depthwise_kernel))
    pointwise.set_weights(
        [
            keras.ops.convert_to_numpy(w)
            for w in (layer.pointwise_kernel, layer.bias)
            if w is not None
        ]
    )
    return depthwise, pointwise
