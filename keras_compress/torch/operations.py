"""What each operation of PyTorch is in Keras: one row per `torch.nn` class, function or method.

A row is a function `(build, *arguments, **keywords) -> result` with the arguments of the call,
Keras tensors in the place of torch tensors; a row of `MODULES` receives the module before them.
`build` is the conversion that is going on: `keras_compress.torch.convert`.
"""

import math

import keras
from keras import ops

from keras_compress.graph.traced_layers import BatchSized

CHANNELS = {"data_format": "channels_first"}


class ConversionError(ValueError):
    """A module, or a step of one, that has no counterpart in Keras."""


class BatchSize:
    """Stands for a number that changes with the size of the batch."""


BATCH = BatchSize()


def _need(build, is_met, expected):
    if not is_met:
        raise ConversionError(f"Expected {expected}. Received: {build.where()}")


def _each(value, rank):
    """Return `value` as a tuple of `rank` numbers: one number counts for every axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _named(kind, rank):
    """Return a layer class whose name holds the number of spatial axes: `Conv2D` of "Conv#D"."""
    return getattr(keras.layers, kind.replace("#", str(rank)))


# Layers with weights


def _affine(module):
    """Return the scale and shift of a normalization, and the options of its layer."""
    names = {"gamma": "weight", "beta": "bias"}
    found = {key: getattr(module, name, None) for key, name in names.items()}
    weights = {
        key: (names[key], tuple(range(value.ndim)))
        for key, value in found.items()
        if value is not None
    }
    return weights, {"scale": "gamma" in weights, "center": "beta" in weights}


def _padded(build, x, pairs, kernel, strides, dilation, value=0.0):
    """Return (the input of a layer with windows, its `padding`).

    Keras' "same" pads as little as gives `ceil(size / stride)` results; anything else is an
    operation of its own.
    """
    if not any(map(any, pairs)):
        return x, "valid"
    same = []
    for size, k, stride, d in zip(x.shape[2:], kernel, strides, dilation, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + d * (k - 1) + 1 - size, 0)
        same.append((total // 2, total - total // 2))
    if value == 0 and pairs == same:
        return x, "same"
    if value == 0 and len(pairs) > 1:
        make, options = _named("ZeroPadding#D", len(pairs)), {"padding": tuple(pairs)} | CHANNELS
        return build.layer(make, x, suffix="-pad", **options), "valid"
    widths = [(0, 0), (0, 0), *pairs]
    return build.run(ops.pad, x, widths, constant_values=value, suffix="-pad"), "valid"


def _windows(build, module):
    """Return the options that convolutions share."""
    strided = max(module.stride) > 1 and max(module.dilation) > 1
    _need(build, not strided, "a convolution with either strides or dilation")
    _need(build, module.padding_mode == "zeros", "a convolution with `padding_mode='zeros'`")
    options = {"kernel_size": module.kernel_size, "strides": module.stride}
    return options | {"dilation_rate": module.dilation, "use_bias": module.bias is not None}


def _convolution(build, module, x):
    rank = len(module.kernel_size)
    options = _windows(build, module) | CHANNELS
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = 0 if module.padding == "valid" else module.padding
        pairs = [(size, size) for size in _each(padding, rank)]
    sizes = (module.kernel_size, module.stride, module.dilation)
    x, options["padding"] = _padded(build, x, pairs, *sizes)
    spatial = tuple(range(2, rank + 2))
    if 1 < module.groups == module.in_channels and rank < 3:
        times = module.out_channels // module.groups
        shape = (*module.kernel_size, module.in_channels, times) if times > 1 else None
        kind, options["depth_multiplier"] = "DepthwiseConv#D", times
        weights = {"kernel": ("weight", (*spatial, 0, 1), shape)}
    else:
        kind = "Conv#D"
        options |= {"filters": module.out_channels, "groups": module.groups}
        weights = {"kernel": ("weight", (*spatial, 1, 0))}
    return build.layer(_named(kind, rank), x, weights, **options)


def _transposed(build, module, x):
    rank = len(module.kernel_size)
    options = _windows(build, module) | {"filters": module.out_channels} | CHANNELS
    _need(build, module.groups == 1, "a transposed convolution with `groups=1`")
    crops = []
    for axis, padding in enumerate(_each(module.padding, rank)):
        kernel = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        stride = module.stride[axis]
        made = (x.shape[2 + axis] - 1) * stride + max(kernel, stride)
        crops.append((padding, made - padding - build.shape[2 + axis]))
    fits = min(map(min, crops)) >= 0
    _need(build, fits, "a transposed convolution whose `output_padding` is at most its `padding`")
    weights = {"kernel": ("weight", (*range(2, rank + 2), 1, 0))}
    x = build.layer(_named("Conv#DTranspose", rank), x, weights, **options)
    if not any(map(any, crops)):
        return x
    if rank > 1:
        options = {"cropping": tuple(crops)} | CHANNELS
        return build.layer(_named("Cropping#D", rank), x, suffix="-crop", **options)
    kept = slice(crops[0][0], x.shape[2] - crops[0][1])
    return build.run(ops.get_item, x, (slice(None), slice(None), kept), suffix="-crop")


def _linear_layer(build, module, x):
    options = {"units": module.out_features, "use_bias": module.bias is not None}
    return build.layer(keras.layers.Dense, x, {"kernel": ("weight", (1, 0))}, **options)


def _embedding(build, module, x):
    _need(build, module.max_norm is None, "an embedding without `max_norm`")
    options = {"input_dim": module.num_embeddings, "output_dim": module.embedding_dim}
    weights = {"embeddings": ("weight", (0, 1))}
    return build.layer(keras.layers.Embedding, x, weights, **options)


def _batch_norm(build, module, x):
    _need(build, module.track_running_stats, "a batch normalization with running statistics")
    _need(build, module.momentum is not None, "a batch normalization with a `momentum`")
    weights, options = _affine(module)
    weights |= {"moving_mean": ("running_mean", (0,)), "moving_variance": ("running_var", (0,))}
    options |= {"axis": 1, "momentum": 1 - module.momentum, "epsilon": module.eps}
    return build.layer(keras.layers.BatchNormalization, x, weights, **options)


def _layer_norm(build, module, x):
    weights, options = _affine(module)
    axis = list(range(-len(module.normalized_shape), 0))
    options |= {"axis": axis if len(axis) > 1 else -1, "epsilon": module.eps}
    return build.layer(keras.layers.LayerNormalization, x, weights, **options)


def _group_norm(build, module, x):
    weights, options = _affine(module)
    options |= {"groups": module.num_groups, "axis": 1, "epsilon": module.eps}
    return build.layer(keras.layers.GroupNormalization, x, weights, **options)


def _prelu(build, module, x):
    rank, size = len(x.shape), module.num_parameters
    shared = list(range(1 if size == 1 else 2, rank))
    shape = (size, *[1] * (rank - 2)) if rank > 2 else None
    return build.layer(
        keras.layers.PReLU, x, {"alpha": ("weight", (0,), shape)}, shared_axes=shared
    )


def _recurrent(build, module, x, state=None):
    kind = type(module).__name__
    plain = module.num_layers == 1 and module.batch_first and state is None
    plain = plain and not module.bidirectional and not module.proj_size
    _need(build, plain, f"{kind} of one layer and direction, `batch_first=True`, from zero states")
    blocks = (1, 0, 2) if kind == "GRU" else None  # Keras: the update gate first
    options = {"units": module.hidden_size, "use_bias": module.bias}
    options |= {"return_sequences": True, "return_state": True}
    names = {"kernel": "weight_ih_l0", "recurrent_kernel": "weight_hh_l0"}
    weights = {key: (name, (1, 0), None, blocks) for key, name in names.items()}
    outputs, *states = build.layer(getattr(keras.layers, kind), x, weights, **options)
    states = [build.run(ops.expand_dims, each, 0, suffix="-state") for each in states]
    return outputs, states[0] if kind == "GRU" else tuple(states)


# Pooling


def _pool(build, x, kind, kernel, stride, padding, value):
    rank = len(x.shape) - 2
    kernel, pairs = _each(kernel, rank), [(size, size) for size in _each(padding, rank)]
    strides = _each(stride, rank) if stride else kernel
    x, padding = _padded(build, x, pairs, kernel, strides, (1,) * rank, value)
    options = {"pool_size": kernel, "strides": strides, "padding": padding} | CHANNELS
    result = build.layer(_named(f"{kind}Pooling#D", rank), x, **options)
    fits = tuple(result.shape) == build.shape
    _need(build, fits, "a pooling whose windows fit without `ceil_mode`")
    return result


def _max_pool(build, x, kernel_size, stride=None, padding=0, dilation=1, **others):
    _need(build, {*_each(dilation, 1)} == {1}, "a pooling without dilation")
    return _pool(build, x, "Max", kernel_size, stride, padding, -math.inf)


def _average_pool(
    build, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True
):
    pads = any(_each(padding, 1))
    _need(build, count_include_pad or not pads, "a pooling with `count_include_pad=True`")
    if pads:  # Keras' "same" leaves the zeros out of its means
        widths = [(size, size) for size in _each(padding, len(x.shape) - 2)]
        x = build.run(ops.pad, x, [(0, 0), (0, 0), *widths], suffix="-pad")
    return _pool(build, x, "Average", kernel_size, stride, 0, 0.0)


def _adaptive_pool(build, x, output_size):
    rank, old, new = len(x.shape) - 2, x.shape[2:], build.shape[2:]
    if set(new) == {1}:
        return build.layer(_named("GlobalAveragePooling#D", rank), x, keepdims=True, **CHANNELS)
    if any(n % m for n, m in zip(old, new, strict=True)):
        options = {"output_size": tuple(new)} | CHANNELS
        return build.layer(_named("AdaptiveAveragePooling#D", rank), x, **options)
    window = tuple(n // m for n, m in zip(old, new, strict=True))
    return build.layer(_named("AveragePooling#D", rank), x, pool_size=window, **CHANNELS)


def _upsample(build, x, size=None, factor=None, mode="nearest", align_corners=None, **others):
    old, new = x.shape[2:], build.shape[2:]
    known = mode in ("nearest", "bilinear") and not align_corners and len(old) == 2
    known = known and not any(n % m for n, m in zip(new, old, strict=True))
    _need(build, known, "an image enlarged a whole number of times, 'nearest' or 'bilinear'")
    times = tuple(n // m for n, m in zip(new, old, strict=True))
    return build.layer(keras.layers.UpSampling2D, x, size=times, interpolation=mode, **CHANNELS)


# Functions and methods


def _unary(function):
    return lambda build, x, *args, inplace=False, **kwargs: build.run(function, x, *args, **kwargs)


def _binary(function):
    return lambda build, x, y: build.run(function, x, y)


def _join(function):
    return lambda build, tensors, dim=0: build.run(function, list(tensors), axis=dim)


def _reduction(function):
    def row(build, x, dim=None, keepdim=False, **others):
        axis = tuple(dim) if isinstance(dim, list) else dim
        return build.run(function, x, axis=axis, keepdims=keepdim)

    return row


def _softmax(function):
    return lambda build, x, dim, *args, **kwargs: build.run(function, x, axis=dim)


def _same(build, x, *args, **kwargs):
    """Nothing, or a change of the type of the numbers."""
    return x if build.dtype == x.dtype else build.run(ops.cast, x, build.dtype)


def _gelu(build, x, approximate="none"):
    return build.run(ops.gelu, x, approximate=approximate == "tanh")


def _clamp(build, x, min=None, max=None):
    if min is not None and max is not None:
        return build.run(ops.clip, x, min, max)
    return build.run(ops.minimum, x, max) if min is None else build.run(ops.maximum, x, min)


def _reshape(build, x, *args, **kwargs):
    """`view`, `flatten`, `unsqueeze` and their like: the shape that comes out says it all."""
    if tuple(x.shape) == build.shape:
        return x
    _need(build, build.shape.count(None) < 2, "one axis that depends on the size of the batch")
    return build.run(ops.reshape, x, [-1 if size is None else size for size in build.shape])


def _permute(build, x, *axes, dims=None):
    axes = dims or (axes[0] if isinstance(axes[0], (tuple, list)) else axes)
    return build.run(ops.transpose, x, [axis % len(x.shape) for axis in axes])


def _split(build, x, size, dim=0):
    """`chunk` and `split`: the shapes that come out say where."""
    sizes = [shape[dim] for shape in build.shape]
    places = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return tuple(build.run(ops.split, x, places, axis=dim)) if places else (x,)


def _unbind(build, x, dim=0):
    indices = range(len(build.shape))
    return tuple(build.run(ops.take, x, i, axis=dim % len(x.shape)) for i in indices)


def _get_item(build, x, key):
    return x[key] if isinstance(x, (tuple, dict)) else build.run(ops.get_item, x, key)


def _expand(build, x, *args, **kwargs):
    return _sized(build, x, "broadcast_to", "shape", build.shape)


def _repeat(build, x, *times):
    times = times[0] if isinstance(times[0], (tuple, list)) else times
    return _sized(build, x, "tile", "repeats", [None if n is BATCH else n for n in times])


def _sized(build, x, function, sized, size):
    if tuple(x.shape) == build.shape:
        return x
    if None not in size:
        return build.run(getattr(ops, function), x, tuple(size))
    return build.run(BatchSized(function, sized, tuple(size), name=build.name()), x, build.anchor)


def _pad(build, x, pad, mode="constant", value=None):
    _need(build, mode == "constant", "a padding with `mode='constant'`")
    pairs = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    widths = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs
    return build.run(ops.pad, x, widths, constant_values=value or 0.0)


def _linear(build, x, weight, bias=None):
    """With a weight that is no `Linear`'s own, such as that of a tied embedding."""
    result = build.run(ops.matmul, x, build.run(ops.transpose, weight, suffix="-weight"))
    return result if bias is None else build.run(ops.add, result, bias)


# The tables


def _rows(row, names):
    return dict.fromkeys(names.split(), row)


def _made(make, names):
    """Return {name in PyTorch: `make(operation)`} of words "name" or "name:name in Keras"."""
    pairs = (word.partition(":") for word in names.split())
    return {name: make(getattr(ops, other or name)) for name, _, other in pairs}


def _reads(row, attributes=""):
    """Return the row of a module that calls `row` with some attributes of it."""
    names = attributes.split()
    return lambda build, module, x: row(build, x, **{n: getattr(module, n) for n in names})


def _dropout(make, **options):
    return lambda build, module, x: build.layer(make, x, rate=module.p, **options)


FUNCTIONS = {
    **_made(_unary, "relu relu6 silu sigmoid tanh hardswish:hard_silu hardsigmoid:hard_sigmoid"),
    **_made(_unary, "leaky_relu elu selu softplus exp log sqrt rsqrt square abs erf neg:negative"),
    **_made(_binary, "add sub:subtract mul:multiply multiply div:divide truediv:divide"),
    **_made(_binary, "matmul bmm:matmul maximum minimum pow:power gt:greater lt:less eq:equal"),
    **_made(_join, "cat:concatenate concat:concatenate stack"),
    **_made(_reduction, "mean sum amax:max amin:min"),
    **_made(_softmax, "softmax log_softmax"),
    **_rows(_same, "contiguous clone detach to float type_as"),
    **_rows(_reshape, "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as"),
    **_rows(_expand, "expand expand_as broadcast_to"),
    **_rows(_split, "chunk split"),
    **_rows(_max_pool, "max_pool1d max_pool2d max_pool3d"),
    **_rows(_average_pool, "avg_pool1d avg_pool2d avg_pool3d"),
    **_rows(_adaptive_pool, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    "gelu": _gelu,
    "clamp": _clamp,
    "permute": _permute,
    "unbind": _unbind,
    "pad": _pad,
    "getitem": _get_item,
    "repeat": _repeat,
    "linear": _linear,
    "interpolate": _upsample,
    "transpose": lambda build, x, dim0, dim1: build.run(ops.swapaxes, x, dim0, dim1),
    "embedding": lambda build, x, weight: build.run(ops.take, weight, x, axis=0),
    "where": lambda build, condition, x, y: build.run(ops.where, condition, x, y),
    "masked_fill": lambda build, x, mask, value: build.run(ops.where, mask, value, x),
    "einsum": lambda build, equation, *tensors: build.run(ops.einsum, equation, *tensors),
}
MODULES = {
    **_rows(_convolution, "Conv1d Conv2d Conv3d"),
    **_rows(_transposed, "ConvTranspose1d ConvTranspose2d ConvTranspose3d"),
    **_rows(_batch_norm, "BatchNorm1d BatchNorm2d BatchNorm3d"),
    "Linear": _linear_layer,
    "Embedding": _embedding,
    "PReLU": _prelu,
    "LayerNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    **{
        name: _reads(FUNCTIONS[name.lower()])
        for name in "ReLU ReLU6 SiLU Sigmoid Tanh Hardswish Hardsigmoid SELU Softplus".split()
    },
    "LeakyReLU": _reads(FUNCTIONS["leaky_relu"], "negative_slope"),
    "ELU": _reads(FUNCTIONS["elu"], "alpha"),
    "GELU": _reads(_gelu, "approximate"),
    "Softmax": _reads(FUNCTIONS["softmax"], "dim"),
    "Hardtanh": lambda build, m, x: _clamp(build, x, m.min_val, m.max_val),
    **_rows(
        _reads(_max_pool, "kernel_size stride padding dilation"), "MaxPool1d MaxPool2d MaxPool3d"
    ),
    **_rows(
        _reads(_average_pool, "kernel_size stride padding count_include_pad"),
        "AvgPool1d AvgPool2d AvgPool3d",
    ),
    **_rows(
        _reads(_adaptive_pool, "output_size"),
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d",
    ),
    "Upsample": _reads(_upsample, "mode align_corners"),
    **_rows(_reads(_reshape), "Flatten Unflatten"),
    "Identity": _reads(_same),
    "Dropout": _dropout(keras.layers.Dropout),
    "Dropout2d": _dropout(keras.layers.SpatialDropout2D, **CHANNELS),
    "Dropout3d": _dropout(keras.layers.SpatialDropout3D, **CHANNELS),
}
