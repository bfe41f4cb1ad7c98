"""Channel rules of products over named axes: `EinsumDense`, `ops.einsum`, `ops.matmul`."""

from keras_compress.graph.channel_labels import (
    READ,
    Channels,
    follow,
    freeze,
    produce,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # stand for the axes of an ellipsis


def einsum_dense(labels, node, given):
    """`EinsumDense`: axes of the input, of the kernel and of the output by their letters."""
    layer, (source,) = node.op, given
    ranks = len(node.inputs[0].shape), len(layer.kernel.shape)
    (inputs, kernel), output = _spelled(layer.equation, ranks)
    letter = None
    if source is not None:
        letter = inputs[source.axis]
        if letter in kernel:
            axis = kernel.index(letter) - len(kernel)
            labels.note(node, "kernel", axis, source.labels, READ)
        elif letter not in output:
            return freeze(labels, node, given, f"'{node.name}' sums over them")
    if letter is not None and letter in output:
        found = source.labels
    else:
        letter = next((x for x in output if x in kernel and x not in inputs), None)
        if letter is None:
            return [None]
        axis = kernel.index(letter) - len(kernel)
        found = produce(labels, node, "kernel", axis, layer.kernel.shape[axis])
    place = output.index(letter) - len(output)
    bias = () if layer.bias is None else tuple(layer.bias.shape)
    if len(bias) >= -place and bias[place] != 1:
        follow(labels, node, found, "bias", axis=place)
    return [Channels(place, found)]


def einsum(labels, node, given):
    """`ops.einsum` of two tensors."""
    if len(node.inputs) != 2:
        return freeze(labels, node, given)
    ranks = [len(edge.shape) for edge in node.inputs]
    return _contract(labels, node, given, *_spelled(node.op.subscripts, ranks))


def matmul(labels, node, given):
    """`ops.matmul`: the last axes are multiplied, the others broadcast."""
    ranks = [len(edge.shape) for edge in node.inputs]
    if len(ranks) != 2 or min(ranks) < 2:
        return freeze(labels, node, given)
    return _contract(labels, node, given, *_spelled("...xy,...yz->...xz", ranks))


def _spelled(equation, ranks):
    """Return (letters of each operand, letters of the output), ellipses spelled out."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    operands, widest = [], ""
    for text, rank in zip(inputs.split(","), ranks, strict=True):
        missing = rank - len(text.replace("...", ""))
        spelled = LETTERS[len(LETTERS) - missing :] if missing else ""
        widest = max(widest, spelled, key=len)
        operands.append(text.replace("...", spelled))
    return operands, output.replace("...", widest)


def _contract(labels, node, given, operands, output):
    """Channels pass through along the axes of the output; those of both operands are unified."""
    letters = {}
    for operand, each in zip(operands, given, strict=True):
        if each is not None and operand[each.axis] in output:
            letters[operand[each.axis]] = each
        elif each is not None:
            labels.freeze(each.labels, f"'{node.name}' sums over them")
    if len(letters) > 1:
        return freeze(labels, node, given, f"'{node.name}' joins them with another tensor")
    if not letters:
        return [None]
    ((letter, found),) = letters.items()
    for edge, operand, each in zip(node.inputs, operands, given, strict=True):
        if letter not in operand:
            continue
        if each is None or operand[each.axis] != letter:
            if edge.shape[operand.index(letter)] != 1:
                return freeze(labels, node, given, f"'{node.name}' joins them with another tensor")
        elif len(each.labels) == len(found.labels):
            labels.unify(found.labels, each.labels)
        else:
            return freeze(labels, node, given, f"'{node.name}' repeats them")
    return [Channels(output.index(letter) - len(output), found.labels)]
