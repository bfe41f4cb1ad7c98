"""Labels of channels, while they flow through a graph, and what the rules of operations share."""

import dataclasses

import numpy as np

from keras_compress.layers import CompressedLayer

PRODUCED, READ, FOLLOWING = "produced", "read", "following"

# Functions of one value: what a channel holds stays in it, and zero stays finite.
UNARY = (
    "Abs Absolute Cast Ceil Clip ConvertToTensor Copy Cos Erf Exp Floor Identity Negative Round "
    "Sign Sin Square StopGradient Dropout GaussianNoise GaussianDropout SpatialDropout1D "
    "SpatialDropout2D SpatialDropout3D ActivityRegularization ReLU LeakyReLU ELU SetMask "
    "StochasticDepth Relu Relu6 Silu Sigmoid HardSigmoid HardSilu HardTanh Gelu Elu Selu Celu "
    "LeakyRelu Tanh Softplus Softsign LogSigmoid Mish HardShrink SoftShrink TanhShrink Squareplus"
).split()


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """Labels along one axis of a tensor; `axis` is counted from the end."""

    axis: int
    labels: np.ndarray


class Labels:
    """Labels while they flow: makes, unifies and freezes them, and notes slices."""

    def __init__(self):
        self.count = 0
        self.unified = []  # pairs of arrays
        self.frozen = []  # (array, reason)
        self.noted = {}  # (layer, weight, axis) -> (array, role)

    def new(self, count):
        """Return an array of fresh labels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def unify(self, labels, others):
        """Make two arrays of labels the same channels, position by position."""
        if labels is not others:
            self.unified.append((labels, others))

    def freeze(self, labels, reason):
        """Keep channels from being removed."""
        self.frozen.append((np.unique(labels), reason))

    def note(self, node, weight, axis, labels, role):
        """Note the labels along an axis of a weight; those of an earlier call are unified.

        Returns the labels that were noted first.
        """
        before = self.noted.setdefault((node.name, weight, axis), (labels, role))[0]
        self.unify(before, labels)
        return before

    def known(self, node, weight, axis):
        """Return the labels noted along an axis of a weight, or None."""
        return self.noted.get((node.name, weight, axis), (None,))[0]

    def channels(self):
        """Return (int array: the channel of every label, number of channels)."""
        parent = list(range(self.count))

        def find(label):
            while parent[label] != label:
                parent[label] = label = parent[parent[label]]
            return label

        for labels, others in self.unified:
            for one, other in zip(labels.tolist(), others.tolist(), strict=True):
                one, other = find(one), find(other)
                if one != other:
                    parent[max(one, other)] = min(one, other)
        roots = np.array([find(label) for label in range(self.count)], dtype="int64")
        distinct, channels = np.unique(roots, return_inverse=True)
        return channels, len(distinct)


def freeze(labels, node, given, reason=""):
    """Freeze channels at a node that cannot keep them apart; its results have none."""
    reason = reason or f"how they move through '{node.name}' ({kind(node.op)}) is not known"
    for each in given:
        if each is not None:
            labels.freeze(each.labels, reason)
    return [None] * len(node.outputs)


def kind(op):
    """Return the class name of an operation, of the plain layer where it is compressed."""
    return (op.keras_class if isinstance(op, CompressedLayer) else type(op)).__name__


def follow(labels, node, found, *weights, axis=-1):
    """Note weights that hold one number per channel, those that the layer has."""
    for weight in weights:
        holder = getattr(node.op, "cell", node.op)
        if getattr(holder, weight, None) is not None:
            labels.note(node, weight, axis, found, FOLLOWING)


def produce(labels, node, weight, axis, count):
    """Return the labels that a weight gives to its output channels."""
    before = labels.known(node, weight, axis)
    if before is not None:
        return before
    return labels.note(node, weight, axis, labels.new(count), PRODUCED)


def read(labels, node, weight, axis, given, expected):
    """Note that a weight sums over the channels of an input along its `expected` axis."""
    if given is None:
        return
    if given.axis != expected:
        labels.freeze(given.labels, f"'{node.name}' reads another axis")
    else:
        labels.note(node, weight, axis, given.labels, READ)
