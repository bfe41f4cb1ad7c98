"""Structures of movement sparsity: blocks of weights, and the whole channels they resolve into."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_compress.algorithms.pruning_plan import (
    holds_mask,
    masked_axes,
    masks_of,
    set_masks,
)
from keras_compress.algorithms.weight_sparsity import input_axis
from keras_compress.compressed_layer import layer_spec
from keras_compress.graph.channel_labels import FOLLOWING
from keras_compress.graph.channels import couple
from keras_compress.masks import ChannelMask
from keras_compress.options import ConfigError
from keras_compress.plan import WeightEntry
from keras_compress.weight_masks import MovementMask


class BlockMask(MovementMask):
    """A `MovementMask` whose weight can be cut inside of blocks, once it is fixed.

    Shapes, formula and gradient: as for `MovementMask` of mode `"block"`. Where channels are taken
    out of the weight, `mask` is cut along with it and holds; the scores, which have no part in it
    any more, stay as many as they were.

    Args:
        mode: `"block"`.
        sparse_factors: size of a block along the last axes.
        score_shape: shape of the scores; None: one per block of the weight.
        **kwargs: as for `MovementMask`.
    """

    def __init__(self, mode="block", sparse_factors=(1,), score_shape=None, **kwargs):
        super().__init__(mode, sparse_factors, **kwargs)
        self.score_shape = None if score_shape is None else tuple(score_shape)

    def build(self, input_shape):
        super().build(input_shape)
        self.score_shape = tuple(self.importance.shape)

    def _block_of(self, shape):
        if self.score_shape is None:
            return super()._block_of(shape)
        block = (1,) * (len(shape) - len(self.sparse_factors)) + self.sparse_factors
        both = zip(shape, self.score_shape, block, strict=True)
        return tuple(size if factor > 1 and count == 1 else factor for size, count, factor in both)

    def _score_shape(self, shape):
        if self.score_shape is None:
            return super()._score_shape(shape)
        both = zip(shape, self.score_shape, self.block, strict=True)
        return tuple(
            count if factor > 1 and count > 1 else size // factor for size, count, factor in both
        )

    def _repeated(self, scores):
        both = zip(scores.shape, self.block, self.mask.shape, strict=True)
        if all(count * factor == size for count, factor, size in both):
            return super()._repeated(scores)
        # The weight was cut: any values will do, made of the scores as they are trained variables.
        return ops.broadcast_to(ops.reshape(scores, (-1,))[0], self.mask.shape)

    def get_config(self):
        config = super().get_config() | {"score_shape": self.score_shape}
        del config["axis"]
        return config


def mask_structure(structure, op, weight):
    """Return the arguments of a `MovementMask` for a weight of a plain layer, a dict.

    NNCF counts in PyTorch's matrices `(outputs, inputs)`. Several output axes of a Keras weight,
    as heads and their channels, are one there, in their order; so are several input axes. The
    space of a convolution is none of them: blocks of `sparse_factors` have size 1 there, slices
    contain all of it.

    Args:
        structure: `SparseStructure`.
        op: the layer.
        weight: attribute of the weight.

    Raises:
        ConfigError: the weight has no such axis, or cannot be divided into such blocks.
    """
    if structure.mode == "fine":
        return {}
    spec = layer_spec(op)
    shape = tuple(spec.read(op, weight).shape)
    outputs, inputs = _matrix_axes(op, weight, shape)
    if structure.mode == "block":
        block = _block(structure.sparse_factors, shape, (outputs, inputs), f"'{op.name}'")
        return {"mode": "block", "sparse_factors": block}
    kept = (outputs, inputs)[structure.axis]
    if not kept:
        raise ConfigError(
            "Expected a weight that sums over an axis. Received: axis=1 for the weight "
            f"'{weight}' of layer '{op.name}' ({type(op).__name__}), shape {shape}"
        )
    if len(kept) == 1:
        return {"mode": "per_dim", "axis": kept[0]}
    sizes = enumerate(shape, -len(shape))
    block = tuple(1 if axis in kept else size for axis, size in sizes)
    return {"mode": "block", "sparse_factors": block}


def _matrix_axes(op, weight, shape):
    """Return the axes of a weight that count outputs, and those that count inputs."""
    outputs = layer_spec(op).channel_axes(op, weight)
    if isinstance(op, keras.layers.EinsumDense):
        return outputs, tuple(axis for axis in range(-len(shape), 0) if axis not in outputs)
    axis = input_axis(op, weight)
    return outputs, () if axis is None else (axis,)


def _block(factors, shape, matrix_axes, where):
    block = [1] * len(shape)
    for factor, axes in zip(factors, matrix_axes, strict=True):
        left = factor
        for axis in reversed(axes):
            size = math.gcd(left, shape[axis])
            block[axis], left = size, left // size
            if size < shape[axis]:
                break
        if left > 1:
            sizes = " x ".join(str(shape[axis]) for axis in axes) or "no"
            raise ConfigError(
                "Expected blocks that divide the weight. Received: sparse_factors="
                f"{list(factors)} for layer {where} with a weight of shape {shape}: {factor} "
                f"does not divide {sizes} {'outputs' if axes is matrix_axes[0] else 'inputs'}"
            )
    return tuple(block)


def first_threshold(masks, share):
    """Return a threshold that takes no more than a share of the weights, a float.

    It is slightly below the score that the share of the weights with the smallest ones ends at.

    Args:
        masks: list of `MovementMask`, built.
        share: in [0, 1).
    """
    scores = [_numpy(mask.importance).ravel() for mask in masks]
    repeats = [np.full(len(s), math.prod(m.block)) for s, m in zip(scores, masks, strict=True)]
    scores, repeats = np.concatenate(scores), np.concatenate(repeats)
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(repeats[order])
    at = np.searchsorted(below, math.floor(share * below[-1]), side="right")
    score = float(scores[order[at]])
    return score - max(1e-6, 1e-6 * abs(score))


def channel_masks(graph, weights):
    """Return the `WeightEntry`s of the masks of whole channels, a tuple.

    Args:
        graph: the `Graph` of a plain model.
        weights: set of `(layer, weight)` that have a `MovementMask`.
    """
    coupling = couple(graph)
    groups = _resolvable(coupling, lambda each: (each.layer, each.weight) in weights)
    may_go = _channels(coupling, groups)
    return tuple(
        WeightEntry(*key, (functools.partial(ChannelMask, axes=axes),), text)
        for key, axes, text in masked_axes(graph, coupling, may_go, holds_mask)
    )


def resolve(graph, masks):
    """Fix learnt masks, resolved into whole channels where channels can be removed.

    A channel goes where every masked weight that holds it is off along it. The channels that stay
    are on again with all of their weights. Weights that hold no such channels are fixed as learnt.

    Args:
        graph: the `Graph` of a compressed model.
        masks: {(layer, weight): `MovementMask`}.
    """
    coupling = couple(graph)
    layers = graph.layer_nodes()

    def is_masked(each):
        found = masks_of(layers[each.layer].op, each.weight)
        return (each.layer, each.weight) in masks and any(each.axis in m.axes for m in found)

    groups = _resolvable(coupling, is_masked)
    may_go = _channels(coupling, groups)
    keep = _kept(coupling, groups, masks)
    slices = {}
    for each in coupling.slices:
        slices.setdefault((each.layer, each.weight), []).append(each)
    for key, mask in masks.items():
        values = mask.mask_values()
        dense, stays = np.zeros_like(values), np.ones_like(values)
        for each in slices.get(key, ()):
            dense |= _along(may_go[each.channels], each.axis, values.ndim)
            stays &= _along(keep[each.channels], each.axis, values.ndim)
        mask.fix((values | dense) & stays)
    set_masks(graph, coupling, keep)


def _resolvable(coupling, is_masked):
    """Return the groups whose channels can go and are masked wherever they are made or read."""
    open_channels = np.zeros(coupling.count, bool)
    for each in coupling.slices:
        if each.role != FOLLOWING and not is_masked(each):
            open_channels[each.channels] = True
    return [
        group
        for group in coupling.groups
        if not group.reason and group.size > 1 and not open_channels[group.channels].any()
    ]


def _channels(coupling, groups):
    found = np.zeros(coupling.count, bool)
    for group in groups:
        found[group.channels] = True
    return found


def _kept(coupling, groups, masks):
    """Return the channels that stay, a bool array over all: at least one of each group."""
    on, scores = np.zeros(coupling.count, bool), np.zeros(coupling.count)
    for each in coupling.slices:
        mask = masks.get((each.layer, each.weight))
        if mask is None:
            continue
        values, importance = mask.mask_values(), _repeated(mask)
        others = tuple(i for i in range(values.ndim) if i != each.axis % values.ndim)
        np.logical_or.at(on, each.channels, values.any(others))
        np.add.at(scores, each.channels, importance.mean(others))
    keep = np.ones(coupling.count, bool)
    for group in groups:
        keep[group.channels] = on[group.channels]
        if not on[group.channels].any():
            keep[group.channels[np.argmax(scores[group.channels])]] = True
    return keep


def _repeated(mask):
    scores = _numpy(mask.importance)
    for axis, size in enumerate(mask.block):
        scores = np.repeat(scores, size, axis)
    return scores


def _along(values, axis, rank):
    shape = [1] * rank
    shape[axis] = len(values)
    return values.reshape(shape)


def _numpy(variable):
    return np.asarray(variable.numpy())
