"""A model pruned at once, and the claim about it: removing channels is masking them."""

import types

import keras
import models
import numpy as np
from backend_helpers import numpy

import keras_compress as kc
from keras_compress.graph.channels import couple
from keras_compress.graph.flops import Shapes, total_flops
from keras_compress.graph.trace import trace

TOLERANCE = 1e-5  # of the range of the unpruned model's output


def pruning_config(level=0.5, **params):
    """Return a configuration that prunes everything that can be, in epoch 0."""
    everything = {"round_to": 1, "prune_first_conv": True, "prune_downsample_convs": True}
    chosen = {"filter_importance": "random", "schedule": "baseline", "pruning_target": level}
    params = everything | chosen | params
    return {"compression": {"algorithm": "filter_pruning", "params": params}}


def run(model, inputs):
    """Return the outputs of a model at inference, as a list of NumPy arrays."""
    return [numpy(y) for y in keras.tree.flatten(model(inputs, training=False))]


def pruned(model, config):
    """Return the masked model, the smaller one and the sizes {quantity: (full, now)} planned."""
    sizes = {size.what: (size.full, size.now) for size in kc.plan(model, config).sizes}
    masked = kc.compress_model(model, config, verbose=False)
    return types.SimpleNamespace(masked=masked, small=kc.strip(masked), sizes=sizes)


def difference(actual, expected, scale=None):
    """Return the largest difference of two lists of outputs, each relative to a third's range."""
    worst = 0.0
    for a, b, c in zip(actual, expected, scale or expected, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        worst = max(worst, float(np.abs(a - b).max() / max(np.ptp(c), 1e-6)))
    return worst


class RunShapes(Shapes):
    """The shapes that the tensors of a graph have when it runs on one sample.

    Layers lose sizes that are known in fact: an `EinsumDense` with None in its `output_shape`.
    """

    def __init__(self, graph, inputs):
        def call(node, *args, **kwargs):
            return node.op(*args, **kwargs)

        sample = [keras.ops.convert_to_tensor(each[:1]) for each in keras.tree.flatten(inputs)]
        self.values = graph.run(sample, call)

    def shape(self, edge):
        return tuple(self.values[edge].shape)


def flops_of(small, model, inputs):
    """Return the FLOPs of a smaller model for one sample.

    By the shapes that it has where it runs, if those of the model before are known.
    """
    graph = trace(small)
    known = all(None not in edge.shape[1:] for edge in trace(model).edges)
    return total_flops(graph, RunShapes(graph, inputs)) if known else total_flops(graph)


def assert_removed_is_masked(model, level=0.5, inputs=None, config=None, **params):
    """Prune a model; the smaller one computes what the masked one does, and is as small as planned.

    Returns:
        What `pruned` gives, with `error` and `change`: how far outputs of the smaller model are
        from those of the masked one, and those of the masked from the unpruned model's.
    """
    inputs = models.inputs_for(model) if inputs is None else inputs
    before = run(model, inputs)
    result = pruned(model, config or pruning_config(level, **params))
    masked, small = run(result.masked, inputs), run(result.small, inputs)
    result.error = difference(small, masked, before)
    result.change = difference(masked, before)
    assert result.error <= TOLERANCE
    assert result.small.count_params() == result.sizes["parameters"][1]
    assert flops_of(result.small, model, inputs) == result.sizes["FLOPs"][1]
    assert model.count_params() == result.sizes["parameters"][0]
    return result


def groups_of(model):
    """Return {name of a group and its further layers: size, or (size, why all are kept)}."""
    return {
        " + ".join([group.name, *group.layers[1:]]): (group.size, group.reason)
        if group.reason
        else group.size
        for group in couple(trace(model)).groups
    }
