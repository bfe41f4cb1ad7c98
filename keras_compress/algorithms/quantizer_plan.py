"""Which weights and edges quantization takes, and why the rest stays float."""

import functools

import keras

from keras_compress.graph.flops import flops, total_flops
from keras_compress.graph.placement import PRODUCTS, QuantizedEdge, folded_into, quantized_edges
from keras_compress.graph.walk import SEPARATOR, Role, first_layers
from keras_compress.layer_specs import DEPTHWISE, LAYERS
from keras_compress.layers import layer_spec
from keras_compress.options import ConfigError
from keras_compress.plan import EdgeEntry, Plan, Untouched, WeightEntry
from keras_compress.quantizers import AsymmetricQuantizer, SymmetricQuantizer

# Widths that devices compute with; those not listed take 2 to 8 bits. NNCF's hardware files
# say the same of GPU and NPU; on CPUs every width runs as 8 bits.
DEVICE_WIDTHS = {
    "GPU": {"weights": (8,), "activations": (8,)},
    "NPU": {"weights": (2, 4, 8), "activations": (4, 8)},
}

FAKE_QUANTIZE = f"{SEPARATOR}fake_quantize"  # ends the name of an edge's quantizer layer


def quantization_plan(options, graph, config, with_data):
    """Return the `Plan` of a `Quantization` for a graph.

    Args:
        options: the `Quantization`.
        graph: the `Graph`.
        config: the whole `Config` (target device, learning-rate multiplier, other algorithms).
        with_data: whether calibration data is at hand.
    """
    first = first_layers(graph)
    products = {node.name for node in graph.nodes if node.is_integer_product}
    claimed = _claims(options, config, graph)
    groups = _edge_groups(options, graph, *claimed)
    common = _common_arguments(options, config)
    weights = tuple(
        _weight_entry(
            options, config, node, weight, node.name in products, node.name in first, common
        )
        for node in graph.layer_nodes().values()
        if node.role is Role.WEIGHTED and options.selects_weight(node.name)
        if node.name not in claimed[0]
        for weight in layer_spec(node.op).weights
    )
    inputs = input_edges(graph)
    seconds = _second_operands(graph)
    edges = tuple(
        _edge_entry(options, config, group, common, inputs, not seconds.isdisjoint(group.edges))
        for group in groups
    )
    options.check_scopes(
        [node.name for node in graph.nodes if node.role is Role.WEIGHTED],
        [edge.name for edge in graph.edges] + [node.name for node in graph.nodes],
    )
    source = (
        "the calibration data"
        if with_data
        else "the calibration data if `data=` is given, else from the first training batches"
    )
    return Plan(
        graph.name,
        weights=weights,
        edges=edges,
        untouched=_untouched(options, graph, groups, *claimed),
        notes=(f"Weight ranges come from the weights, activation ranges from {source}.",),
    )


def _claims(options, config, graph):
    """Return (weights, inputs): names of the layers whose ones other algorithms round."""
    others = [each for each in config.algorithms if each is not options]
    weights, inputs = frozenset(), frozenset()
    for algorithm in others:
        found = algorithm.claims(graph)
        weights, inputs = weights | found[0], inputs | found[1]
    return weights, inputs


def widths_of(group, device, candidates=range(2, 9)):
    """Return those of some widths that a device computes with.

    Args:
        group: `"weights"` or `"activations"`.
        device: the `target_device` of the configuration.
        candidates: widths in bits.

    Raises:
        ConfigError: there is none.
    """
    known = DEVICE_WIDTHS.get(device, {}).get(group)
    fitting = [bits for bits in candidates if known is None or bits in known]
    if not fitting:
        raise ConfigError(
            f"Expected widths of {group} that target_device {device} computes with, of "
            f"{list(known)}. Received: {list(candidates)}. Target device TRIAL allows all."
        )
    return fitting


def _common_arguments(options, config):
    return {
        "learnable": options.learn_ranges,
        "range_gradient": options.range_gradient,
        "lr_multiplier": options.gradient_factor(config),
    }


def _check_width(group, name, bits, config):
    try:
        widths_of(group, config.target_device, [bits])
    except ConfigError as error:
        raise ConfigError(f"Quantizer of the {group} of '{name}': {error}") from None


def _of_width(options, group, bits):
    """Return the arguments that depend on width and group."""
    return {
        "bits": bits,
        "gradient_scale": options.gradient_scale_at(bits),
        "staged": options.params.stages(group),
    }


def _weight_entry(options, config, node, weight, is_product, is_first, common):
    spec = options.weight_spec(node.name)
    _check_width("weights", node.name, spec.bits, config)
    half_range = (
        spec.mode == "symmetric"
        and is_product
        and options.overflow_fix_applies(config.target_device, spec.bits, is_first)
    )
    axes = layer_spec(node.op).channel_axes(node.op, weight, is_product)
    axis = axes if spec.per_channel else None
    # Of few levels none is left out: the engines' types have room for the lowest code.
    narrow = {"half_range": True} if half_range else {"narrow_range": spec.bits == 8}
    kind = SymmetricQuantizer
    if spec.mode == "asymmetric":
        kind, narrow = AsymmetricQuantizer, {}
    # A forced `signed` of false is for activations; weights of both signs overrule it anyway.
    arguments = {"axis": axis, "signed": spec.signed, **narrow, **common}
    arguments |= _of_width(options, "weights", spec.bits)
    if spec.mode == "symmetric" and spec.signed is None:
        arguments["signed"] = True
    text = f"{spec.bits} bits {spec.mode} {'per channel' if axis else 'per tensor'}"
    text += " (7-bit levels)" if half_range else ""
    make = functools.partial(kind, **arguments)
    return WeightEntry(node.name, weight, (make,), text)


def _edge_entry(options, config, group, common, inputs, is_second_operand):
    edge = group.edges[0]
    if inputs.issuperset(group.edges):
        # The range of data is known once it was seen; to learn it, the gradient of the first
        # layer's input would have to be computed for it alone.
        common = common | {"learnable": False}
    spec = options.activation_spec(edge.name)
    _check_width("activations", edge.name, spec.bits, config)
    axis = _depthwise_channels(group) if spec.per_channel else None
    arguments = {"axis": axis, "signed": spec.signed, **common}
    arguments |= _of_width(options, "activations", spec.bits)
    half_range = is_second_operand and options.overflow_fix_applies(config.target_device, spec.bits)
    mode = spec.mode
    if half_range:
        mode = "symmetric"
        arguments |= {"half_range": True, "signed": True}
    kind = AsymmetricQuantizer if mode == "asymmetric" else SymmetricQuantizer
    if mode == "symmetric":
        arguments["limit"] = _limit(group)
    text = f"{spec.bits} bits {mode} {'per channel' if axis else 'per tensor'}"
    text += " (7-bit levels)" if half_range else ""
    name = edge.name + FAKE_QUANTIZE
    return EdgeEntry(name, group, functools.partial(kind, **arguments), text)


def _second_operands(graph):
    """Return the edges that become, moved or not, the second operand of a product of two tensors.

    It takes the place of the weights in the kernels that may add two products in 16 bits.
    """
    found = set()
    for node in graph.nodes:
        if type(node.op).__name__ not in PRODUCTS or len(node.inputs) != 2:
            continue
        waiting = [node.inputs[1]]
        while waiting:
            edge = waiting.pop()
            found.add(edge)
            if edge.producer is not None and edge.producer.role is Role.MOVEMENT:
                waiting.extend(edge.producer.carried)
    return found


def _limit(group):
    """Return the largest value that the rounded tensors can have where a ReLU caps all, or None."""
    caps = [_cap(edge.producer.op) if edge.producer else None for edge in group.edges]
    return None if None in caps else max(caps)


def _cap(op):
    if isinstance(op, keras.layers.ReLU):
        return None if op.negative_slope else op.max_value
    is_relu6 = getattr(op, "activation", None) is keras.activations.relu6
    return 6.0 if is_relu6 or type(op).__name__ == "Relu6" else None


def _depthwise_channels(group):
    """Return the channel axis where only depthwise convolutions read, else None.

    Any other reader sums over the channels, which takes one scale in integer arithmetic.
    """
    readers = [node.op if node else None for node, _ in group.readers]
    if not all(isinstance(op, DEPTHWISE) for op in readers):
        return None
    axes = {-1 if op.data_format == "channels_last" else -1 - op.rank for op in readers}
    return tuple(axes) if len(axes) == 1 else None


def _edge_groups(options, graph, own_weights, own_inputs):
    """Place the activation quantizers, minus what scopes and `quantize_inputs` exclude.

    Layers of `own_inputs` run in integers too, but their inputs are rounded by others.
    """

    def wanted(node):
        if node.role is Role.WEIGHTED:
            return node.name in own_inputs or options.selects_weight(node.name)
        return options.selects(node.name)

    raw_inputs = set() if options.quantize_inputs else input_edges(graph)
    groups = [
        group
        for group in quantized_edges(graph, wanted, options.quantize_outputs, own_inputs)
        if not any(edge in raw_inputs for edge in group.edges)
        and all(options.activations.selects(edge.name) for edge in group.edges)
    ]
    for names in options.activations.unified_scale_ops or ():
        groups = _join(groups, names)
    return groups


def _join(groups, names):
    """Merge the groups read by the named nodes into one, at the place of the first."""
    chosen = [g for g in groups if any(node and node.name in names for node, _ in g.readers)]
    if len(chosen) < 2:
        return groups
    joined = QuantizedEdge(
        tuple(edge for group in chosen for edge in group.edges),
        frozenset().union(*(group.readers for group in chosen)),
    )
    return [joined if g is chosen[0] else g for g in groups if g not in chosen[1:]]


def input_edges(graph):
    """Return the edges that carry a model input, moved or preprocessed in float at most."""
    carried = set(graph.inputs)
    for node in graph.nodes:
        passes = node.role in (Role.MOVEMENT, Role.FLOAT) and not node.reason
        if passes and node.inputs and all(edge in carried for edge in node.inputs):
            carried.update(node.outputs)
    return carried


def _untouched(options, graph, groups, own_weights, own_inputs):
    """List what stays float, with the reason and its share of the model's FLOPs."""
    readers = {pair for group in groups for pair in group.readers}
    total = max(total_flops(graph), 1)
    entries = {}
    for node in graph.nodes:
        if node.name in own_inputs:
            continue
        reason = _why_float(options, node, readers, node.name in own_weights)
        if reason:
            count = flops(node)
            before = entries[node.name].flops if node.name in entries else 0
            entries[node.name] = Untouched(
                node.name, type(node.op).__name__, reason, before + count, (before + count) / total
            )
    return tuple(sorted(entries.values(), key=lambda entry: -entry.flops))


def _why_float(options, node, readers, is_own):
    """Return why a node's arithmetic stays float, or an empty string where nothing is left."""
    if node.reason:
        return node.reason
    role = node.role
    if role in (Role.MOVEMENT, Role.FAKE_QUANTIZE, Role.PARAMETER):
        return ""
    if not any(edge.is_float for edge in node.outputs):
        return ""  # masks and indices
    if role in (Role.NORMALIZATION, Role.ACTIVATION) and folded_into(node) is not None:
        return ""
    if role is Role.FLOAT:
        return _why_unsupported(node.op)
    if not is_own and not options.selects(node.name):
        return "excluded by the scopes of the configuration"
    if role is Role.WEIGHTED and not is_own and not options.weights.selects(node.name):
        return "excluded by the scopes of `weights`"
    if role is not Role.WEIGHTED:
        return ""
    if not node.is_integer_product:
        return layer_spec(node.op).reason if flops(node) else ""
    rounded = any(
        (node, edge) in readers or _is_rounded_before(edge, readers) for edge in node.inputs
    )
    return "" if rounded else "its input is not quantized"


def _is_rounded_before(edge, readers):
    """Whether an edge arrives through data movement from a rounded one."""
    node = edge.producer
    return node is not None and any(
        (node, source) in readers or _is_rounded_before(source, readers)
        for source in node.carried
        if node.role is Role.MOVEMENT
    )


def _why_unsupported(op):
    parent = next((base for base in type(op).__mro__[1:] if base in LAYERS), None)
    if parent is not None:
        return f"a subclass of {parent.__name__}: its `call` may do something else"
    return f"no integer form of {type(op).__name__} is known"
