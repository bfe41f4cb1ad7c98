"""Trace a module into steps that have one counterpart in Keras each.

What has none is replaced by PyTorch code that does the same in smaller steps, and traced through:
the graph of PyTorch is taken apart like that of Keras, and each tensor of the Keras model has a
node that makes the same one.
"""

import contextlib
import inspect

import keras
import torch
import torch.nn.functional as F
from torch.fx.node import map_aggregate

from keras_compress.graph.walk import unique_name
from keras_compress.torch.operations import (
    BATCH,
    MODULES,
    ConversionError,
    function_row,
    paddings,
    spelled,
)

# Calls whose results depend on the shape and type of a tensor, not on its numbers.
ASKED = (
    "size dim numel is_floating_point zeros_like ones_like full_like new_zeros new_ones new_full"
)
# Whether a mask is causal is read off its numbers where it is not said; it changes nothing.
HINTS = {torch.nn.TransformerEncoder: "is_causal", torch.nn.TransformerDecoder: "tgt_is_causal"}
DIFFERENT = object()


@contextlib.contextmanager
def plain_transformers():
    """Let transformers compute as in training: else they ask for the values of their masks."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@plain_transformers()
def traced(module, examples):
    """Trace a module into operations and modules of `torch.nn`.

    Args:
        module: the module, in evaluation mode; it is taken apart.
        examples: tuple of tensors to call it on; other arguments keep their defaults.

    Returns:
        A `torch.fx.GraphModule` whose nodes have in their `meta`: "made", what a node makes, with
        `KerasTensor`s in the place of tensors and `BATCH` in that of numbers that change with the
        batch; "known", its value where no input and no weight goes into it, tensors as arrays
        with the batch as an axis of size 1.

    Raises:
        ConversionError: the module's steps depend on the values of its tensors.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[len(examples) :]
    concrete = {p.name: p.default for p in parameters if p.default is not p.empty}
    module = _opened(module)
    graph, copies = torch.fx.Graph(), {}  # one that can be saved without this tracer
    try:
        found = _Tracer(module, examples).trace(module, concrete)
    except ConversionError:
        raise
    except Exception as error:  # whatever the module does to stand-ins for tensors
        raise ConversionError(
            "Expected a module whose steps do not depend on the values of its tensors: "
            "`torch.fx` cannot follow it. Move such a part out of the module, or rewrite it with "
            f"tensor operations. Received: module={type(module).__name__}; "
            f"{type(error).__name__}: {error}"
        ) from error
    graph.output(graph.graph_copy(found, copies))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    for node in graph.find_nodes(op="placeholder")[len(examples) :]:  # they keep their defaults
        graph.erase_node(node)
    return torch.fx.GraphModule(module, graph, type(module).__name__).eval()


class _Stand(torch.fx.Proxy):
    """Stands for a tensor, or something made of one, in tracing; takes functions apart."""

    def __getattr__(self, name):
        return _Attribute(self, name)

    def __len__(self):
        return len(self.node.meta["made"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in OPENED_FUNCTIONS:
            return OPENED_FUNCTIONS[function](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


class _Attribute(_Stand, torch.fx.proxy.Attribute):
    """Stands for an attribute of such a thing, such as its shape."""


class _Tracer(torch.fx.Tracer):
    """Traces a module and runs it on two sizes of batches along the way, to know each result."""

    def __init__(self, module, examples):
        super().__init__()
        self.pads, self.is_running, self.runs = {}, False, []
        for batch in (examples, [torch.cat([x, x[:1]]) for x in examples]):
            run = torch.fx.Interpreter(module, False, torch.fx.Graph())
            run.args_iter = iter([each.clone() for each in batch])
            self.runs.append(run)

    def proxy(self, node):
        return _Stand(node, self)

    def is_leaf_module(self, m, path):
        has_row = spelled(type(m)) in MODULES or one_call(m) is not None
        return has_row and super().is_leaf_module(m, path)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if self.is_running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m, forward, args, kwargs):
        if self.is_running:
            return forward(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        if type(m) in HINTS:
            kwargs = {**kwargs, HINTS[type(m)]: False}
        if getattr(m, "padding_mode", "zeros") != "zeros":
            pairs = paddings(m)
            self.pads[m] = [size for pair in pairs[::-1] for size in pair], m.padding_mode
            m.padding, m.padding_mode = (0,) * len(pairs), "zeros"
        if m in self.pads:
            args, kwargs = (F.pad(inputs[0], *self.pads[m]),), {}
        if type(m) is torch.nn.Embedding and m.max_norm is None and _is_known(inputs[0]):
            return F.embedding(inputs[0], m.weight)  # the same rows for every input: of positions
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj):
        value = obj.node.meta.get("known", BATCH)
        return super().to_bool(obj) if value is BATCH else bool(value)

    def create_node(self, kind, target, *args, **kwargs):
        node = super().create_node(kind, target, *args, **kwargs)
        self.is_running = True  # calls are not traced
        try:
            with torch.no_grad():
                for run in self.runs:
                    run.env[node] = run.run_node(node)
        except Exception as error:  # whatever the module raises
            raise ConversionError(
                "Expected a module that can be called on its example inputs, and on one sample "
                f"more. Received: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.is_running = False
        self.observe(node, *(run.env[node] for run in self.runs))
        return node

    def observe(self, node, one, other):
        """Note what a node makes, and its value where no data goes into it."""
        made = node.meta["made"] = _merged(one, other, _spec)
        has_tensors = any(map(is_tensor, leaves(made)))
        rest = [each for each in node.all_input_nodes if "known" not in each.meta]
        is_known = node.op == "get_attr" and not one.is_floating_point()
        if node.op in ("call_function", "call_method"):
            is_asked = rest == node.all_input_nodes[:1] and spelled(node.target) in ASKED.split()
            is_known = not rest or is_asked or (node.target is getattr and not has_tensors)
        value = _merged(one, other, _constant) if is_known else None
        if is_known and not any(leaf is DIFFERENT for leaf in leaves(value)):
            node.meta["known"] = value


def _is_known(value):
    return isinstance(value, torch.Tensor) or "known" in value.node.meta


def leaves(structure):
    """Return a list of what is in nested tuples, lists and dicts."""
    found = []
    map_aggregate(structure, found.append)
    return found


def is_tensor(value):
    """Whether something stands for a tensor in Keras."""
    return isinstance(value, keras.KerasTensor)


def _merged(one, other, of_tensors):
    """Return a structure of results of two batches: one of tensors, and equal numbers or BATCH."""
    rest = iter(leaves(other))

    def merged(leaf):
        changed = next(rest)
        if isinstance(leaf, torch.Tensor):
            pairs = zip(leaf.shape, changed.shape, strict=True)
            shape = [size if size == new else None for size, new in pairs]
            return of_tensors(leaf, changed, shape)
        return leaf if leaf == changed else BATCH

    return map_aggregate(one, merged)


def _spec(one, other, shape):
    return keras.KerasTensor(shape, str(one.dtype).removeprefix("torch."))


def _constant(one, other, shape):
    """Return an array with the batch as an axis of size 1, DIFFERENT where samples differ."""
    cut = one[tuple(slice(1 if size is None else size) for size in shape)]
    return cut.clone().cpu().numpy() if torch.equal(cut.expand_as(other), other) else DIFFERENT


def one_call(module):
    """Return the node of the one function that a module without weights is, None for others."""
    try:
        nodes = list(torch.fx.Tracer().trace(module).nodes)
    except Exception:  # whatever it does to a stand-in for a tensor
        return None
    is_one = [node.op for node in nodes[::2]] == ["placeholder", "output"] and len(nodes) == 3
    return nodes[1] if is_one and function_row(nodes[1]) else None


def _opened(module):
    """Return a module whose inner modules without a counterpart are replaced, in place."""
    replaced = {}
    for path, each in list(module.named_modules(remove_duplicate=False))[::-1]:
        if _is_composite(each):
            new = replaced[each] = replaced.get(each) or COMPOSITES[type(each)](each)
            if path:
                module.set_submodule(path, new)
    return replaced.get(module, module)


def _is_composite(module):
    if type(module) not in COMPOSITES or isinstance(module, torch.nn.MultiheadAttention):
        return type(module) in COMPOSITES
    is_simple = module.num_layers == 1 and module.batch_first and not module.bidirectional
    return not is_simple and not module.proj_size


class _Composite(torch.nn.Module):
    """Base of what stands for a module: with its settings, which others may read."""

    def __init__(self, module):
        super().__init__()
        settings = {name: x for name, x in vars(module).items() if not name.startswith("_")}
        vars(self).update(settings)
        self.dropout = torch.nn.Dropout(module.dropout) if module.dropout else torch.nn.Identity()


class _Attention(_Composite):
    """A `MultiheadAttention` as three projections, products and a projection."""

    def __init__(self, module):
        super().__init__(module)
        if module.bias_k is not None or module.add_zero_attn:
            raise ConversionError(
                "Expected a `MultiheadAttention` without added keys. Received: one with "
                f"add_bias_kv={module.bias_k is not None}, add_zero_attn={module.add_zero_attn}"
            )
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        out = module.out_proj
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(out.weight, out.bias)

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        """Return (result, weights of the keys) as the `MultiheadAttention` does."""
        parts = []
        for layer, x in ((self.query, query), (self.key, key), (self.value, value)):
            x = layer(x if self.batch_first else x.transpose(0, 1))
            parts.append(x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        weights = _weights(*parts[:2], self.head_dim**-0.5, attn_mask, key_padding_mask)
        weights = self.dropout(weights)
        x = self.out_proj(torch.matmul(weights, parts[2]).transpose(1, 2).flatten(2))
        x = x if self.batch_first else x.transpose(0, 1)
        return x, weights.mean(1) if average_attn_weights else weights


def _linear(weight, bias):
    """Return a `Linear` with copies of parts of parameters."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None:
            value = torch.nn.Parameter(part.detach().clone(), part.requires_grad)
            setattr(layer, name, value)
    return layer


def _weights(query, key, scale, *masks):
    """Return `softmax(scale * query . key + masks)`; boolean masks are true at keys left out."""
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    for mask in masks:
        if mask is not None:
            is_boolean = mask.dtype == torch.bool
            scores = scores.masked_fill(mask, -torch.inf) if is_boolean else scores + mask
    return F.softmax(scores, -1)


class _Recurrent(_Composite):
    """An `LSTM`, `GRU` or `RNN` as one for each layer and direction, all with `batch_first`."""

    def __init__(self, module):
        super().__init__(module)
        self.is_pair = isinstance(module, torch.nn.LSTM)
        self.ways = ("", "_reverse")[: 1 + module.bidirectional]
        options = {"bias": module.bias, "batch_first": True}
        if isinstance(module, torch.nn.RNN):
            options["nonlinearity"] = module.nonlinearity
        for layer in range(self.num_layers):
            size = len(self.ways) * module.hidden_size if layer else module.input_size
            for way in self.ways:
                part = type(module)(size, module.hidden_size, **options)
                for name, _ in list(part.named_parameters()):
                    setattr(part, name, getattr(module, name.replace("l0", f"l{layer}{way}")))
                self.add_module(f"l{layer}{way}", part)

    def forward(self, x, state=None):
        """Return (results of all steps, last states) as the module does."""
        x = x if self.batch_first else x.transpose(0, 1)
        ends = []
        for layer in range(self.num_layers):
            x = self.dropout(x) if layer else x
            results = []
            for way in self.ways:
                begin = None if state is None else self.of_states(_part(len(ends)), state)
                part = getattr(self, f"l{layer}{way}")
                result, end = part(x.flip(1) if way else x, begin)
                results.append(result.flip(1) if way else result)
                ends.append(end)
            x = _joined(*results, dim=-1)
        return x if self.batch_first else x.transpose(0, 1), self.of_states(_joined, *ends)

    def of_states(self, function, *states):
        """Return what a function makes of states; those of an `LSTM` are pairs."""
        if not self.is_pair:
            return function(*states)
        return tuple(function(*(each[index] for each in states)) for index in (0, 1))


def _part(index):
    return lambda state: state[index : index + 1]


def _joined(*parts, dim=0):
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


COMPOSITES = {
    torch.nn.MultiheadAttention: _Attention,
    **dict.fromkeys((torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN), _Recurrent),
}


# Functions in smaller steps


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if enable_gqa:
        times = query.size(-3) // key.size(-3)
        key, value = (x.repeat_interleave(times, -3) for x in (key, value))
    if is_causal:
        sizes = query.size(-2), key.size(-2)
        attn_mask = torch.full(sizes, -torch.inf, device=query.device).triu(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return torch.matmul(_weights(query, key, scale, attn_mask), value)


def _dropout(x, p=0.5, training=True, inplace=False):
    """A `Dropout`: tracing has fixed whether the function drops."""
    if training:
        raise ConversionError(
            "Expected a dropout that ends with training, `F.dropout(x, p, self.training)`. "
            f"Received: training=True for '{x.node.name}'"
        )
    root = x.tracer.root
    name = unique_name("dropout", {name for name, _ in root.named_modules()}, "_")
    root.add_module(name, torch.nn.Dropout(p).eval())
    return x.tracer.create_proxy("call_module", name, (x,), {})


def _normalize(x, p=2.0, dim=1, eps=1e-12, out=None):
    if p != 2:
        raise ConversionError(f"Expected `F.normalize` with p=2. Received: {p=}")
    return x / x.square().sum(dim, keepdim=True).sqrt().clamp(min=eps)


def _pixel_shuffle(x, factor):
    parts = x.unflatten(1, (-1, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    return parts.flatten(4, 5).flatten(2, 3)


def _channel_shuffle(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


OPENED_FUNCTIONS = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    F.normalize: _normalize,
    F.pixel_shuffle: _pixel_shuffle,
    F.channel_shuffle: _channel_shuffle,
    F.mish: lambda x, inplace=False: x * torch.tanh(F.softplus(x)),
}
