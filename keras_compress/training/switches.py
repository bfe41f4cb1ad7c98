"""Switches: a compressed model whose layers are compressed or not at the turn of variables."""

import dataclasses
import functools

import keras
import numpy as np

from keras_compress.algorithms import FilterPruning
from keras_compress.algorithms.pruning_plan import kept_by_masks, set_masks
from keras_compress.compressed_layer import CompressedLayer
from keras_compress.compressed_model import compressed_by
from keras_compress.graph.walk import Role
from keras_compress.plan import Plan
from keras_compress.quantizers import Quantizer
from keras_compress.weight_masks import WeightMask

OUTPUT = "model output"  # reads the tensors that are rounded for the caller


class Switches:
    """A compressed model whose layers are compressed or not at the turn of variables.

    A layer's own are the quantizers and masks of its weights and the quantizers of the tensors that
    it reads. A tensor that several layers read is rounded as soon as one of them is on. Masks of
    channels are set together with all that depends on those channels.

    Args:
        model: a `CompressedModel` made by `with_switches`, its masks as they shall be where layers
            are on.

    Attributes:
        model: the model, which is changed.
        units: tuple of tuples of layer names: what is on or off together, in order of execution.
            Layers whose channels only go together are one unit.
    """

    def __init__(self, model):
        self.model = model
        graph = model.graph()
        self._quantizers = [*_weight_quantizers(model), *_edge_quantizers(graph)]
        self._masks = [
            (layer.name, mask, mask.mask_values())
            for layer, mask in _transforms(model)
            if isinstance(mask, WeightMask)
        ]
        pruning = [each for each in model.config.algorithms if isinstance(each, FilterPruning)]
        self._prunable = pruning[0].prunable(model) if pruning else None
        self._groups = self._prunable.groups if pruning else []
        if pruning:
            self._kept = kept_by_masks(self._prunable.graph, self._prunable.coupling)
        together = [set(group.layers) for group in self._groups]
        together += [{name} for names, _ in self._quantizers for name in names]
        together += [{name} for name, *_ in self._masks]
        self.units = _units(together, [*graph.layer_nodes(), OUTPUT])

    def put(self, on):
        """Compress the layers named, and no others."""
        on = set(on)
        for names, quantizer in self._quantizers:
            quantizer.enabled.assign(not on.isdisjoint(names))
        for name, mask, values in self._masks:
            mask.set_mask(values if name in on else np.ones_like(values))
        if self._prunable is not None:
            keep = self._prunable.everything.copy()
            for group in self._groups:
                if not on.isdisjoint(group.layers):
                    keep[group.channels] = self._kept[group.channels]
            set_masks(self._prunable.graph, self._prunable.coupling, keep)


def _transforms(model):
    """Return pairs (layer, transform) over all weights of a compressed model."""
    layers = [layer for layer in model.layers if isinstance(layer, CompressedLayer)]
    return [(x, t) for x in layers for name in x.weight_names for t in x.transforms_of(name)]


def _weight_quantizers(model):
    """Return pairs (names of the layers, quantizer) of the weights."""
    pairs = _transforms(model)
    return [({layer.name}, each) for layer, each in pairs if isinstance(each, Quantizer)]


def _edge_quantizers(graph):
    """Return pairs (names of what reads it, quantizer) of the edges."""
    names, quantizers = {}, {}
    for node in graph.nodes:
        if node.role is Role.FAKE_QUANTIZE:
            names.setdefault(node.name, set()).update(_readers(graph, node))
            quantizers[node.name] = node.op.quantizer
    return [(names[name], quantizer) for name, quantizer in quantizers.items()]


def _readers(graph, node):
    """Return the names of what computes with the outputs of a node, moved or not."""
    found, waiting = set(), list(node.outputs)
    while waiting:
        edge = waiting.pop()
        if any(edge is output for output in graph.outputs):
            found.add(OUTPUT)
        for reader in edge.consumers:
            if reader.role is Role.MOVEMENT:
                waiting.extend(reader.outputs)
            elif reader.role is not Role.FAKE_QUANTIZE:
                found.add(reader.name)
    return found


def _units(together, order):
    """Return the unions of the sets that have names in common, as tuples, in a given order."""
    joined = []
    for names in together:
        touching = [each for each in joined if not each.isdisjoint(names)]
        joined = [each for each in joined if each.isdisjoint(names)]
        joined.append(names.union(*touching))
    position = {name: index for index, name in enumerate(order)}
    units = [tuple(sorted(names, key=position.get)) for names in joined]
    return tuple(sorted(units, key=lambda unit: position[unit[0]]))


def with_switches(model, graph):
    """Return a twin of a compressed model whose quantizers all have a switch, and are on.

    Args:
        model: a calibrated `CompressedModel`, just made by `compress_model`, or with other masks.
        graph: the `Graph` of the model that it was made from.
    """
    decided = Plan(graph.name)
    for algorithm in sorted(model.config.algorithms, key=lambda each: each.stage):
        decided = decided.merge(algorithm.plan(graph, model.config, with_data=True))
    # By position: operations of a subclassed model are numbered anew whenever it is traced.
    done = [model.get_layer(entry["layer"]) for entry in model.plan["weights"]]
    weights = [
        dataclasses.replace(entry, transforms=_copies(layer.transforms_of(entry.weight)))
        for entry, layer in zip(decided.weights, done, strict=True)
    ]
    rounding = [model.get_layer(entry["name"]).quantizer for entry in model.plan["edges"]]
    edges = [
        dataclasses.replace(entry, transform=_copies([quantizer])[0])
        for entry, quantizer in zip(decided.edges, rounding, strict=True)
    ]
    decided = dataclasses.replace(decided, weights=tuple(weights), edges=tuple(edges))
    twin = compressed_by(graph, decided, model.config)
    twin.progress.update(model.progress)
    for entry, layer in zip(weights, done, strict=True):
        twins = twin.get_layer(entry.layer).transforms_of(entry.weight)
        for old, new in zip(layer.transforms_of(entry.weight), twins, strict=True):
            _copy_state(old, new)
    for entry, quantizer in zip(edges, rounding, strict=True):
        _copy_state(quantizer, twin.get_layer(entry.name).quantizer)
    return twin


def _copies(transforms):
    """Return functions without arguments that make transforms alike; quantizers with a switch."""
    return tuple(functools.partial(_copy, transform) for transform in transforms)


def _copy(transform):
    switch = {"staged": True} if isinstance(transform, Quantizer) else {}
    return type(transform).from_config(transform.get_config() | switch)


def _copy_state(old, new):
    """Give a transform the values of another; on JAX they must not share memory."""
    values = {variable.name: variable for variable in old.variables}
    for variable in new.variables:
        if variable.name in values:
            variable.assign(np.array(keras.ops.convert_to_numpy(values[variable.name])))
    if isinstance(new, Quantizer):
        new.enable()
