"""Channel coupling: which channels of a graph can only be removed together.

Every output channel of a layer with weights gets a label, a whole number. Labels flow through the
graph with the tensors: element-wise operations unify those of their operands, concatenation joins
them, and data movement is done by running the operation on the labels (`channel_rules` has one rule
per operation). What is not known to keep channels apart freezes the labels that it meets.

Labels that were unified are one channel. A channel is removed by taking its positions out of every
`Slice`, the axis of a weight, that holds its labels.
"""

import collections
import dataclasses

import numpy as np

from keras_compress.graph.channel_labels import PRODUCED, Labels, freeze, kind
from keras_compress.graph.channel_rules import propagate

SHAPED = ("Reshape", "BatchSized")


@dataclasses.dataclass(frozen=True)
class Slice:
    """The channels along one axis of one weight.

    Attributes:
        layer: name of the layer.
        weight: attribute that holds the weight.
        axis: axis of the weight, counted from the end.
        channels: int array, the channel of every position along the axis.
        role: `"produced"` by the weight, `"read"` by it, or `"following"`: a bias or scale beside.
    """

    layer: str
    weight: str
    axis: int
    channels: np.ndarray
    role: str


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that the same layers produce: pruning ranks them among each other.

    Where a tensor holds some of them only, as parts of a split do, these are a group of their own.

    Attributes:
        name: the first layer that produces them, numbered where it produces several groups.
        layers: names of all layers that produce them.
        channels: int array, in the order of their first positions.
        reason: why none of them can be removed; empty where they can.
    """

    name: str
    layers: tuple
    channels: np.ndarray
    reason: str

    @property
    def size(self):
        """Number of channels."""
        return len(self.channels)


@dataclasses.dataclass(frozen=True)
class Coupling:
    """The channels of a graph.

    Attributes:
        slices: tuple of `Slice`.
        edges: {`Edge`: (axis from the end, int array with the channel of every position)}.
        groups: tuple of `ChannelGroup` in order of execution.
        count: number of channels; they are numbered from 0.
    """

    slices: tuple
    edges: dict
    groups: tuple
    count: int

    def edge_shape(self, edge, keep):
        """Return the shape of an edge when only channels with `keep[channel]` remain."""
        shape = list(edge.shape)
        if edge in self.edges:
            axis, channels = self.edges[edge]
            shape[axis] = int(keep[channels].sum())
        return tuple(shape)

    def kept_positions(self, keep):
        """Return {(layer, weight): {axis: positions that remain}} for the weights that are cut."""
        cuts = collections.defaultdict(dict)
        for each in self.slices:
            mask = keep[each.channels]
            if not mask.all():
                cuts[each.layer, each.weight][each.axis] = np.flatnonzero(mask)
        return dict(cuts)


def couple(graph):
    """Return the `Coupling` of a `Graph`."""
    labels, edges = Labels(), {}
    first_calls = {}
    for node in graph.nodes:
        given = [edges.get(edge) for edge in node.inputs]
        results = propagate(labels, node, given)
        call = id(node.op), bool(node.kwargs.get("reverse"))
        _compare_calls(
            labels, node, (given, results), first_calls.setdefault(call, (given, results))
        )
        edges.update(zip(node.outputs, results, strict=True))
    for edge in graph.outputs:
        if edges.get(edge) is not None:
            labels.freeze(edges[edge].labels, "the model gives it out")
    channels, count = labels.channels()
    slices = tuple(
        Slice(layer, weight, axis, channels[found], role)
        for (layer, weight, axis), (found, role) in labels.noted.items()
    )
    reasons = {}
    for found, reason in labels.frozen:
        for channel in np.unique(channels[found]).tolist():
            reasons.setdefault(channel, reason)
    return Coupling(
        slices,
        {e: (each.axis, channels[each.labels]) for e, each in edges.items() if each is not None},
        tuple(_groups(slices, reasons, _holders(channels, edges))),
        count,
    )


def _compare_calls(labels, node, call, first):
    """What a layer that is called several times has once must fit all of its calls.

    Weights that are cut need channels along the same axes in all inputs. A reshape has one target
    shape: its results keep the same channels.
    """
    (given, results), (first_given, first_results) = call, first
    if getattr(node.op, "weights", ()) and _layout(given) != _layout(first_given):
        reason = f"'{node.name}' is called on tensors of other channels"
        freeze(labels, node, [*given, *first_given], reason)
    if kind(node.op) not in SHAPED:
        return
    for one, other in zip(results, first_results, strict=True):
        if one is other:
            continue
        pair = [each for each in (one, other) if each is not None]
        if len(pair) == 2 and one.axis == other.axis and len(one.labels) == len(other.labels):
            labels.unify(one.labels, other.labels)
            continue
        for each in pair:
            labels.freeze(each.labels, f"'{node.name}' is called on tensors of other layouts")


def _layout(given):
    return [each and each.axis for each in given]


def _holders(channels, edges):
    """Return {channel: numbers of the tensors that hold it}; those of the same channels are one."""
    held = [np.unique(channels[each.labels]) for each in edges.values() if each is not None]
    holders = collections.defaultdict(list)
    for number, found in enumerate({each.tobytes(): each for each in held}.values()):
        for channel in found.tolist():
            holders[channel].append(number)
    return holders


def _groups(slices, reasons, holders):
    """Yield the groups of channels that the same weights produce and the same tensors hold.

    As long as one channel of each group stays, no tensor is left without any.
    """
    producers = collections.defaultdict(list)  # channel -> indices of slices that produce it
    for index, each in enumerate(slices):
        if each.role == PRODUCED:
            for channel in dict.fromkeys(each.channels.tolist()):
                producers[channel].append(index)
    members = collections.defaultdict(list)
    for channel, indices in producers.items():
        reason = reasons.get(channel, "")
        parts = () if reason else tuple(holders[channel])
        members[tuple(indices), reason, parts].append(channel)
    names = collections.Counter()
    for (indices, reason, _), channels in members.items():
        layers = tuple(dict.fromkeys(slices[index].layer for index in indices))
        names[layers[0]] += 1
        number = names[layers[0]]
        name = layers[0] if number == 1 else f"{layers[0]} ({number})"
        yield ChannelGroup(name, layers, np.array(channels), reason)
