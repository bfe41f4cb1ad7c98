"""Masks that Keras carries beside the tensors: the flat model makes of them what the model does."""

import keras
import masked_models
import models
import numpy as np
import pytest
from backend_helpers import numpy
from keras import layers

from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace
from keras_compress.graph.traced_layers import CausalMask, ReadMask, SetMask

NAMES = [
    name
    for name, function in models.MODELS.items()
    if function.__module__ == masked_models.__name__
]
PADDED = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0], [1, 0, 0, 0, 0], [2, 2, 3, 4, 5]], "int32")


def padded(model):
    """Return inputs of which each sample is padded at its end."""
    inputs = models.inputs_for(model)

    def pad(leaf):
        mask = PADDED[:, : leaf.shape[1]] > 0
        leaf = np.maximum(leaf, 1) if leaf.dtype == "int32" else leaf
        return leaf * mask.reshape(mask.shape + (1,) * (leaf.ndim - 2)).astype(leaf.dtype)

    return keras.tree.map_structure(pad, inputs)


def call(model, inputs):
    """Return the output of a model with one, and its mask."""
    output = model(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs))
    mask = getattr(output, "_keras_mask", None)
    return numpy(output), None if mask is None else numpy(mask)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_their_masks_stay(name):
    model = models.make(name)
    graph = trace(model)
    flat = rebuild(graph)
    inputs = padded(model)
    (expected, expected_mask), (output, mask) = call(model, inputs), call(flat, inputs)
    np.testing.assert_allclose(output, expected, atol=1e-6 * np.abs(expected).max())
    assert (mask is None) == (expected_mask is None)
    if mask is not None:
        np.testing.assert_array_equal(mask, expected_mask)
    assert not any(node.reason for node in graph.nodes)


def test_padding_changes_nothing_in_the_flat_model():
    flat = rebuild(trace(models.make("masked_block_of_unknown_length")))
    short, _ = call(flat, PADDED[1:2, :3])
    long, _ = call(flat, PADDED[1:2])
    np.testing.assert_allclose(long, short, rtol=1e-5)


def test_the_loss_leaves_out_what_is_masked():
    model = models.make("masked_wrappers")
    flat = rebuild(trace(model))
    targets = np.ones((*PADDED.shape, 4), "float32")
    losses = []
    for each in (model, flat):
        each.compile(loss="mse")
        losses.append(each.evaluate(PADDED, targets, verbose=0))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    errors = np.square(call(flat, PADDED)[0] - targets).mean(-1)
    assert losses[1] != pytest.approx(errors.mean(), rel=1e-3)


def test_time_steps_that_are_given_their_mask_stay_whole():
    tokens = keras.Input((4, 5), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.TimeDistributed(layers.LSTM(2), name="steps")(x))
    assert "implicit mask" in trace(model).layer_nodes()["steps"].reason


def test_the_layers_that_stand_for_masks():
    values = keras.ops.convert_to_tensor(np.ones((2, 3, 4), "float32"))
    expected = np.array([[True, True, False], [True, False, False]])
    masked = SetMask()(values, mask=keras.ops.convert_to_tensor(expected))
    np.testing.assert_array_equal(numpy(ReadMask()(masked)), expected)
    np.testing.assert_array_equal(numpy(masked), numpy(values))
    assert getattr(SetMask(drop=True)(masked), "_keras_mask", None) is None
    assert getattr(masked, "_keras_mask", None) is not None
    assert SetMask.from_config(SetMask(drop=True).get_config()).drop
    causal = numpy(CausalMask()(values, values[:, :2]))
    np.testing.assert_array_equal(causal, [np.tri(3, 2, dtype=bool)])
