"""Trace a module, and take apart what has no single counterpart in Keras.

Attention becomes projections, products and a softmax in the graph of PyTorch too: each tensor of
the Keras model then has a node that makes the same one.
"""

import inspect
import operator

import torch

from keras_compress.torch.operations import ConversionError

OPENED = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
ATTENTION_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    *("average_attn_weights", "is_causal"),
)


def traced(module, count):
    """Return a module as a `torch.fx.GraphModule` of operations and modules of `torch.nn`.

    Args:
        module: the module, in evaluation mode.
        count: number of arguments that it is called with; the others keep their defaults.

    Raises:
        ConversionError: the module's steps depend on the values of its tensors.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[count:]
    concrete = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer = torch.fx.Tracer()
    is_leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda each, name: is_leaf(each, name) and not isinstance(each, OPENED)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it asks for the values of its inputs
    try:
        graph = tracer.trace(module, concrete)
    except Exception as error:  # whatever the module does to stand-ins for tensors
        raise ConversionError(
            "Expected a module whose steps do not depend on the values of its tensors: "
            "`torch.fx` cannot follow it. Move such a part out of the module, or rewrite it with "
            f"tensor operations. Received: module={type(module).__name__}; "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    _drop_unused(graph, count)
    result = torch.fx.GraphModule(module, graph, type(module).__name__)
    _take_apart(result)
    return result.eval()


def _drop_unused(graph, count):
    """Erase what the results do not depend on, and arguments that keep their defaults."""
    nodes = list(graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    wanted = {nodes[-1], *placeholders[:count]}
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
        else:
            graph.erase_node(node)


def _take_apart(graph):
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", "")
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        with graph.graph.inserting_before(node):
            if type(module) is torch.nn.MultiheadAttention:
                _open_attention(graph, node, module)
            elif type(module) is torch.nn.Embedding and _is_fixed(node.all_input_nodes[0], module):
                rows = (node.all_input_nodes[0], graph.graph.get_attr(f"{node.target}.weight"))
                look_up = torch.nn.functional.embedding
                _replace(graph, node, graph.graph.call_function(look_up, rows))
            elif node.op == "call_function" and name == "scaled_dot_product_attention":
                _replace(graph, node, _product(graph.graph, *node.args, **node.kwargs))
            elif node.op == "call_function" and name == "dropout":
                _replace(graph, node, _dropout(graph, node, *node.args, **node.kwargs))
    graph.recompile()


def _is_fixed(node, module):
    """Whether an embedding looks up the same rows for every input, as that of positions does."""
    if node.target in (getattr, "size"):  # a shape or a device
        return module.max_norm is None
    is_call = node.op in ("call_function", "call_method")
    return is_call and all(_is_fixed(each, module) for each in node.all_input_nodes)


def _replace(graph, node, new):
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _dropout(graph, node, x, p=0.5, training=True, inplace=False):
    """Return the call of a `Dropout`: tracing has fixed whether the function drops."""
    if training:
        raise ConversionError(
            "Expected a dropout that ends with training, `F.dropout(x, p, self.training)`. "
            f"Received: node '{node.name}' with training=True"
        )
    graph.add_submodule(node.name, torch.nn.Dropout(p))
    return graph.graph.call_module(node.name, (x,))


def _product(
    graph,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    drop=None,
):
    """Return the node of `softmax(scale * query . key + mask) . value`."""
    if enable_gqa:
        raise ConversionError(
            "Expected attention with as many keys as queries have heads. Repeat the keys and "
            f"values. Received: enable_gqa=True, query of node '{query.name}'"
        )
    if scale is None:
        size = graph.call_method("size", (query, -1))
        scale = graph.call_function(operator.pow, (size, -0.5))
    keys = graph.call_method("transpose", (key, -2, -1))
    scores = graph.call_function(torch.matmul, (query, keys))
    scores = graph.call_function(operator.mul, (scores, scale))
    if is_causal:
        sizes = tuple(graph.call_method("size", (each, -2)) for each in (query, key))
        device = graph.call_function(getattr, (query, "device"))
        full = graph.call_function(torch.full, (sizes, -torch.inf), {"device": device})
        attn_mask = graph.call_method("triu", (full, 1))
    if attn_mask is not None:
        scores = graph.call_function(operator.add, (scores, attn_mask))
    weights = graph.call_function(torch.nn.functional.softmax, (scores, -1))
    if drop is not None:
        weights = graph.call_module(drop, (weights,))
    return graph.call_function(torch.matmul, (weights, value))


def _open_attention(graph, node, module):
    """Replace a `MultiheadAttention` by three projections, products and a projection."""
    given = dict(zip(ATTENTION_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    masks = [given.get(name) for name in ("key_padding_mask", "attn_mask", "is_causal")]
    firsts = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    plain = module.batch_first and module.bias_k is None and not module.add_zero_attn
    if any(mask not in (None, False) for mask in masks) or not firsts or not plain:
        raise ConversionError(
            "Expected a `MultiheadAttention` with `batch_first=True`, without masks and added "
            "keys, of which only the first result is read: use "
            "`torch.nn.functional.scaled_dot_product_attention` for others. "
            f"Received: node '{node.name}' in module '{node.target}'"
        )
    path, flow = node.target, graph.graph
    graph.set_submodule(path, _projections(module))
    parts = []
    for name in ATTENTION_ARGUMENTS[:3]:
        part = flow.call_module(f"{path}.{name}", (given[name],))
        part = flow.call_method("unflatten", (part, -1, (-1, module.head_dim)))
        parts.append(flow.call_method("transpose", (part, 1, 2)))
    result = _product(flow, *parts, drop=f"{path}.dropout" if module.dropout else None)
    result = flow.call_method("flatten", (flow.call_method("transpose", (result, 1, 2)), 2))
    result = flow.call_module(f"{path}.out_proj", (result,))
    for user in list(node.users):
        _replace(graph, user, result)
    flow.erase_node(node)


def _projections(module):
    """Return a module of the layers inside a `MultiheadAttention`."""
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    weights = dict(zip(ATTENTION_ARGUMENTS[:3], zip(weights, biases, strict=True), strict=False))
    weights["out_proj"] = (module.out_proj.weight, module.out_proj.bias)
    found = torch.nn.ModuleDict({"dropout": torch.nn.Dropout(module.dropout)})
    for name, (weight, bias) in weights.items():
        layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
        layer.weight = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().clone(), bias.requires_grad)
        found[name] = layer
    return found
