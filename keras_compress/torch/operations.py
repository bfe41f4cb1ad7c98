"""What each operation of PyTorch is in Keras: one row per `torch.nn` class, function or method.

A row is a function `(build, *arguments, **keywords) -> result` with the arguments of the call,
Keras tensors in the place of torch tensors; a row of `MODULES` receives the module before them.
`build` is the conversion that is going on: `keras_compress.torch.convert`. Rows for one, two and
three axes are one: their names are those in PyTorch without "1d", "2d" and "3d". A module that
only calls a function needs no row of its own.
"""

import math
import re

import keras
import torch
from keras import ops

from keras_compress.graph.traced_layers import BatchSized

CHANNELS = {"data_format": "channels_first"}
# Functions of these modules are PyTorch's; others may be the user's.
OWN = ("None", "torch", "_operator", "math", "builtins")
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}


class ConversionError(ValueError):
    """A module, or a step of one, that has no counterpart in Keras."""


class BatchSize:
    """Stands for a number that changes with the size of the batch."""


BATCH = BatchSize()


def spelled(target):
    """Return the name of a function, method or class that its row has."""
    name = target if isinstance(target, str) else target.__name__
    name = re.sub(r"(?<=[a-z])[123]d$", "", name.strip("_"))
    return IN_PLACE.get(name, name)


def function_row(node):
    """Return the row of an fx node that calls a function or method, None where there is none."""
    home = str(getattr(node.target, "__module__", None)).partition(".")[0]
    is_own = node.op == "call_method" or (node.op == "call_function" and home in OWN)
    return FUNCTIONS.get(spelled(node.target)) if is_own else None


def paddings(module):
    """Return the (begin, end) of the padding of a convolution along each of its axes."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    sizes = _each(0 if module.padding == "valid" else module.padding, len(module.kernel_size))
    return [(size, size) for size in sizes]


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
    found = [("gamma", "weight"), ("beta", "bias")]
    found = [pair for pair in found if getattr(module, pair[1], None) is not None]
    weights = {key: (name, tuple(range(getattr(module, name).ndim))) for key, name in found}
    options = {"scale": "gamma" in weights, "center": "beta" in weights}
    return weights, options | {"epsilon": module.eps}


def _padded(build, x, pairs, kernel, strides, dilation=None, value=0.0):
    """Return (the input of a layer with windows, its `padding`).

    Keras' "same" pads as little as gives `ceil(size / stride)` results; anything else is an
    operation of its own.
    """
    if not any(map(any, pairs)):
        return x, "valid"
    same = []
    dilation = dilation or [1] * len(kernel)
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
    options = {"strides": module.stride, "dilation_rate": module.dilation} | CHANNELS
    return options | {"kernel_size": module.kernel_size, "use_bias": module.bias is not None}


def _convolution(build, module, x):
    rank = len(module.kernel_size)
    options = _windows(build, module)
    sizes = (module.kernel_size, module.stride, module.dilation)
    x, options["padding"] = _padded(build, x, paddings(module), *sizes)
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
    options = _windows(build, module) | {"filters": module.out_channels}
    _need(build, module.groups == 1, "a transposed convolution with `groups=1`")
    crops = []
    for axis, padding in enumerate(module.padding):
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
    kept = [slice(begin, size - end) for (begin, end), size in zip(crops, x.shape[2:], strict=True)]
    return build.run(ops.get_item, x, (slice(None), slice(None), *kept), suffix="-crop")


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
    options |= {"axis": 1, "momentum": 1 - module.momentum}
    return build.layer(keras.layers.BatchNormalization, x, weights, **options)


def _layer_norm(build, module, x):
    weights, options = _affine(module)
    axis = list(range(-len(module.normalized_shape), 0))
    options["axis"] = axis if len(axis) > 1 else -1
    return build.layer(keras.layers.LayerNormalization, x, weights, **options)


def _group_norm(build, module, x):
    """`GroupNorm` and `InstanceNorm`, whose groups are of one channel."""
    running = getattr(module, "track_running_stats", False)
    _need(build, not running, "an instance normalization without running statistics")
    weights, options = _affine(module)
    options |= {"groups": getattr(module, "num_groups", -1), "axis": 1}
    return build.layer(keras.layers.GroupNormalization, x, weights, **options)


def _rms_norm(build, module, x):
    is_known = len(module.normalized_shape) == 1 and module.elementwise_affine
    _need(build, is_known, "an `RMSNorm` of one axis, with a weight")
    epsilon = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    weights = {"scale": ("weight", (0,))}
    return build.layer(keras.layers.RMSNormalization, x, weights, epsilon=epsilon)


def _prelu(build, module, x):
    rank, size = len(x.shape), module.num_parameters
    shared = list(range(1 if size == 1 else 2, rank))
    shape = (size, *[1] * (rank - 2)) if rank > 2 else None
    weights = {"alpha": ("weight", (0,), shape)}
    return build.layer(keras.layers.PReLU, x, weights, shared_axes=shared)


def _recurrent(build, module, x, state=None):
    kind = {"RNN": "SimpleRNN"}.get(type(module).__name__, type(module).__name__)
    _need(build, not module.proj_size, "an `LSTM` without `proj_size`")
    blocks = (1, 0, 2) if kind == "GRU" else None  # Keras: the update gate first
    options = {"units": module.hidden_size, "use_bias": module.bias}
    options |= {"return_sequences": True, "return_state": True}
    if kind == "SimpleRNN":
        options["activation"] = module.nonlinearity
    names = {"kernel": "weight_ih_l0", "recurrent_kernel": "weight_hh_l0"}
    weights = {key: (name, (1, 0), None, blocks) for key, name in names.items()}
    begin = [] if state is None else keras.tree.flatten(state)
    given = {}
    if any(isinstance(each, keras.KerasTensor) or each.any() for each in begin):
        begin = [build.run(ops.squeeze, each, 0, suffix="-state") for each in begin]
        given = {"initial_state": begin}
    make = getattr(keras.layers, kind)
    outputs, *states = build.layer(make, x, weights, given=given, **options)
    states = [build.run(ops.expand_dims, each, 0, suffix="-state") for each in states]
    return outputs, tuple(states) if kind == "LSTM" else states[0]


def _dropout(build, module, x):
    """`Dropout`, and those that drop whole channels."""
    channels = type(module).__name__ != "Dropout"
    shape = (None, None, *[1] * (len(x.shape) - 2)) if channels else None
    return build.layer(keras.layers.Dropout, x, rate=module.p, noise_shape=shape)


# Pooling


def _pooled(build, x, kernel, stride, padding):
    """Return (sizes of windows, strides, paddings) along each axis; `ceil_mode` pads the end."""
    old, new = x.shape[2:], build.shape[2:]
    kernel, padding = _each(kernel, len(old)), _each(padding, len(old))
    strides = _each(stride, len(old)) if stride else kernel
    ends = [(n - 1) * s + k - m for n, s, k, m in zip(new, strides, kernel, old, strict=True)]
    return kernel, strides, [(p, max(p, end - p)) for p, end in zip(padding, ends, strict=True)]


def _pool(build, x, kind, kernel, strides, padding):
    options = {"pool_size": kernel, "strides": strides, "padding": padding} | CHANNELS
    return build.layer(_named(f"{kind}Pooling#D", len(kernel)), x, **options)


def _max_pool(build, x, kernel_size, stride=None, padding=0, dilation=1, *others, **named):
    _need(build, {*_each(dilation, 1)} == {1}, "a pooling without dilation")
    kernel, strides, pairs = _pooled(build, x, kernel_size, stride, padding)
    x, padding = _padded(build, x, pairs, kernel, strides, value=-math.inf)
    return _pool(build, x, "Max", kernel, strides, padding)


def _average_pool(
    build, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, *others
):
    _need(build, not any(others), "a pooling without `divisor_override`")
    kernel, strides, pairs = _pooled(build, x, kernel_size, stride, padding)
    if count_include_pad and any(_each(padding, 1)):
        begins = [(begin, begin) for begin, _ in pairs]
        x = build.run(ops.pad, x, [(0, 0), (0, 0), *begins], suffix="-pad")
        pairs = [(0, end - begin) for begin, end in pairs]
    same, padding = _padded(build, x, pairs, kernel, strides)  # "same" leaves zeros out of means
    _need(build, same is x, "a pooling that leaves out the padding of Keras' `padding='same'`")
    return _pool(build, x, "Average", kernel, strides, padding)


def _adaptive_pool(kind):
    def row(build, x, *args, **kwargs):
        old, new = x.shape[2:], build.shape[2:]
        if set(new) == {1}:
            make, options = _named(f"Global{kind}Pooling#D", len(old)), {"keepdims": True}
        elif any(n % m for n, m in zip(old, new, strict=True)):
            make, options = _named(f"Adaptive{kind}Pooling#D", len(old)), {"output_size": new}
        else:
            make = _named(f"{kind}Pooling#D", len(old))
            options = {"pool_size": tuple(n // m for n, m in zip(old, new, strict=True))}
        return build.layer(make, x, **options, **CHANNELS)

    return row


def _upsample(build, x, size=None, factor=None, mode="nearest", align_corners=None, **others):
    old, new = x.shape[2:], build.shape[2:]
    known = mode in ("nearest", "bilinear") and not align_corners and len(old) == 2
    known = known and not any(n % m for n, m in zip(new, old, strict=True))
    _need(build, known, "an image enlarged a whole number of times, 'nearest' or 'bilinear'")
    times = tuple(n // m for n, m in zip(new, old, strict=True))
    return build.layer(keras.layers.UpSampling2D, x, size=times, interpolation=mode, **CHANNELS)


# Functions and methods


def _unary(function):
    def row(build, x, *args, inplace=False, **kwargs):
        args = [each for each in args if not isinstance(each, bool)]  # `inplace`
        return build.run(function, x, *args, **kwargs)

    return row


def _binary(function):
    return lambda build, x, y: build.run(function, x, y)


def _join(function):
    return lambda build, tensors, dim=0: build.run(function, list(tensors), axis=dim)


def _along(function):
    def row(build, x, dim=-1, *args, **kwargs):
        return build.run(function, x, axis=tuple(dim) if isinstance(dim, list) else dim)

    return row


def _reduction(function):
    def row(build, x, dim=None, keepdim=False, **others):
        axis = tuple(dim) if isinstance(dim, list) else dim
        return build.run(function, x, axis=axis, keepdims=keepdim)

    return row


def _extreme(kind):
    """`max` and `min`: of two tensors, of all numbers, or (values, indices) along an axis."""

    def row(build, x, dim=None, keepdim=False):
        if isinstance(dim, keras.KerasTensor):
            return build.run(getattr(ops, f"{kind}imum"), x, dim)
        found = build.run(getattr(ops, kind), x, axis=dim, keepdims=keepdim)
        if dim is None:
            return found
        indices = getattr(ops, f"arg{kind}")
        return found, build.run(indices, x, axis=dim, keepdims=keepdim, suffix="-indices")

    return row


def _attribute(build, x, name):
    """Of a tensor; or of what `max` and `topk` return."""
    if isinstance(x, tuple):
        return x[("values", "indices").index(name)]
    _need(build, name in ("T", "mT"), "no attribute of a tensor but its transpose, shape and type")
    return build.run(ops.swapaxes, x, -2, -1)


def _same(build, x, *args, **kwargs):
    """Nothing, or a change of the type of the numbers."""
    return x if build.dtype == x.dtype else build.run(ops.cast, x, build.dtype)


def _softplus(build, x, beta=1, threshold=20):
    _need(build, beta == 1, "a softplus with `beta=1`")
    return build.run(ops.softplus, x)


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
    """`permute` and, without axes, `t`."""
    axes = dims or (axes[0] if axes and isinstance(axes[0], (tuple, list)) else axes) or (1, 0)
    return build.run(ops.transpose, x, [axis % len(x.shape) for axis in axes])


def _split(build, x, size, dim=0):
    """`chunk` and `split`: the shapes that come out say where."""
    sizes = [shape[dim] for shape in build.shape]
    places = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return tuple(build.run(ops.split, x, places, axis=dim)) if places else (x,)


def _get_item(build, x, key):
    if isinstance(x, (tuple, list, dict)):
        return x[key]
    return build.run(ops.get_item, x, key if isinstance(key, tuple) else (key,))


def _repeat(build, x, *times):
    times = times[0] if isinstance(times[0], (tuple, list)) else times
    return _sized(build, x, [None if n is BATCH else n for n in times], "tile", "repeats")


def _sized(build, x, size, function="broadcast_to", sized="shape"):
    if tuple(x.shape) == build.shape:
        return x
    if None not in size:
        return build.run(getattr(ops, function), x, tuple(size))
    return build.run(BatchSized(function, sized, tuple(size), name=build.name()), x, build.anchor)


def _taken(build, x, dim, index):
    return build.run(ops.take, x, index, axis=dim % len(x.shape))


def _pad(build, x, pad, mode="constant", value=None):
    pairs = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    widths = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs
    if mode == "constant":
        return build.run(ops.pad, x, widths, constant_values=value or 0.0)
    return build.run(ops.pad, x, widths, mode=mode)


def _linear(build, x, weight, bias=None):
    """With a weight that is no `Linear`'s own, such as that of a tied embedding."""
    result = build.run(ops.matmul, x, build.run(ops.transpose, weight, suffix="-weight"))
    return result if bias is None else build.run(ops.add, result, bias)


def _rows(row, names):
    return dict.fromkeys(names.split(), row)


def _made(make, names):
    """Return {name in PyTorch: `make(operation)`} of words "name" or "name:name in Keras"."""
    pairs = (word.partition(":") for word in names.split())
    return {name: make(getattr(ops, other or name)) for name, _, other in pairs}


FUNCTIONS = {
    **_made(_unary, "relu relu6 silu sigmoid tanh hardswish:hard_silu hardsigmoid:hard_sigmoid"),
    **_made(_unary, "leaky_relu elu selu celu log_sigmoid softsign tanhshrink:tanh_shrink"),
    **_made(_unary, "hardshrink:hard_shrink softshrink:soft_shrink threshold exp log log1p expm1"),
    **_made(_unary, "sqrt rsqrt square abs erf sin cos sign floor round neg:negative reciprocal"),
    **_made(_unary, "invert:logical_not logical_not tril triu"),
    **_made(_binary, "add sub:subtract mul:multiply multiply div:divide truediv:divide"),
    **_made(_binary, "matmul bmm:matmul maximum minimum pow:power gt:greater lt:less eq:equal"),
    **_made(_binary, "ne:not_equal ge:greater_equal le:less_equal floordiv:floor_divide mod"),
    **_made(_binary, "logical_and logical_or and:logical_and or:logical_or"),
    **_made(_join, "cat:concatenate concat:concatenate stack"),
    **_made(_along, "softmax log_softmax flip cumsum glu"),
    **_made(_reduction, "mean sum prod all any amax:max amin:min argmax argmin logsumexp"),
    **_rows(_same, "contiguous clone detach to float type_as"),
    **_rows(_reshape, "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as"),
    **_rows(_split, "chunk split"),
    **_rows(_clamp, "clamp clip"),
    "hardtanh": lambda build, x, min_val, max_val, **others: _clamp(build, x, min_val, max_val),
    **_rows(lambda build, x, *axes: build.run(ops.swapaxes, x, *axes), "transpose swapaxes"),
    **_rows(lambda build, x, *size: _sized(build, x, build.shape), "expand expand_as broadcast_to"),
    "gelu": lambda build, x, approximate="none": build.run(ops.gelu, x, approximate == "tanh"),
    "unbind": lambda build, x, dim=0: [_taken(build, x, dim, i) for i in range(len(build.shape))],
    "narrow": lambda build, x, dim, i, n: _taken(build, x, dim, list(range(i, i + n))),
    **_rows(_taken, "select index_select"),
    "max": _extreme("max"),
    "min": _extreme("min"),
    "getattr": _attribute,
    "getitem": _get_item,
    "softplus": _softplus,
    **_rows(_permute, "permute t"),
    "pad": _pad,
    "repeat": _repeat,
    "repeat_interleave": lambda build, x, n, dim: build.run(ops.repeat, x, n, axis=dim),
    "roll": lambda build, x, shifts, dims: build.run(ops.roll, x, shifts, axis=dims),
    "topk": lambda build, x, k: tuple(build.run(ops.top_k, x, k)),
    "linear": _linear,
    "interpolate": _upsample,
    "max_pool": _max_pool,
    "avg_pool": _average_pool,
    "adaptive_avg_pool": _adaptive_pool("Average"),
    "adaptive_max_pool": _adaptive_pool("Max"),
    "embedding": lambda build, x, weight, **others: build.run(ops.take, weight, x, axis=0),
    "gather": lambda build, x, dim, i: build.run(ops.take_along_axis, x, i, axis=dim),
    "where": lambda build, condition, x, y: build.run(ops.where, condition, x, y),
    "masked_fill": lambda build, x, mask, value: build.run(ops.where, mask, value, x),
    "einsum": lambda build, equation, *tensors: build.run(ops.einsum, equation, *tensors),
}
MODULES = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "BatchNorm": _batch_norm,
    "Linear": _linear_layer,
    "Embedding": _embedding,
    "PReLU": _prelu,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    **_rows(_group_norm, "GroupNorm InstanceNorm"),
    **_rows(_recurrent, "LSTM GRU RNN"),
    "Dropout": _dropout,
    "Identity": lambda build, module, x: x,
}
