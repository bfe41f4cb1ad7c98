"""Labels of channels, the coupling of a graph, and the graph without some of its channels."""

import channel_cases
import keras
import models
import numpy as np
import pytest
from keras import layers, ops
from pruning_helpers import assert_removed_is_masked, flops_of, groups_of, run

from keras_compress.graph.channel_labels import READ, Labels
from keras_compress.graph.channels import Coupling, Slice, couple
from keras_compress.graph.flops import total_flops
from keras_compress.graph.narrow import Narrowing
from keras_compress.graph.rebuild import rebuild
from keras_compress.graph.trace import trace

CASES = [name for name, case in channel_cases.CASES.items() if case.prunes]


def two_convolutions():
    """image -> a (4) -> relu -> b (3, given out)."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="a")(inputs)
    x = layers.Conv2D(3, 1, name="b")(layers.MaxPooling2D(name="pool")(x))
    return models.randomize(keras.Model(inputs, x, name="two"))


def flattened():
    """image -> a (4) -> 3 x 3 x 4 numbers -> head."""
    inputs = keras.Input((3, 3, 2), name="image")
    x = layers.Conv2D(4, 1, name="a")(inputs)
    x = layers.Dense(2, name="head")(layers.Flatten(name="flatten")(x))
    return models.randomize(keras.Model(inputs, x, name="flat"))


def narrowed(model, off):
    """Return the `Narrowing` of a model without the channels at the positions `off` of layer a."""
    graph = trace(model)
    coupling = couple(graph)
    keep = np.ones(coupling.count, bool)
    (group,) = [group for group in coupling.groups if group.name == "a"]
    keep[group.channels[off]] = False
    return Narrowing(graph, coupling, keep)


# Labels


def test_labels_are_numbered_on():
    labels = Labels()
    assert labels.new(3).tolist() == [0, 1, 2]
    assert labels.new(2).tolist() == [3, 4]
    assert labels.count == 5


def test_channels_without_unions_are_the_labels():
    labels = Labels()
    labels.new(4)
    channels, count = labels.channels()
    assert channels.tolist() == [0, 1, 2, 3]
    assert count == 4


def test_no_labels_no_channels():
    channels, count = Labels().channels()
    assert channels.tolist() == []
    assert count == 0


def test_unified_labels_are_one_channel():
    labels = Labels()
    a, b, c = labels.new(2), labels.new(2), labels.new(2)
    labels.unify(b, c)
    labels.unify(a, c)
    channels, count = labels.channels()
    assert channels.tolist() == [0, 1, 0, 1, 0, 1]
    assert count == 2


def test_union_crosses_positions():
    labels = Labels()
    a, b = labels.new(3), labels.new(3)
    labels.unify(a, b[::-1])
    labels.unify(a[:2], a[1:])
    channels, count = labels.channels()
    assert count == 1
    assert set(channels.tolist()) == {0}


def test_union_of_arrays_of_other_lengths_is_an_error():
    labels = Labels()
    labels.unify(labels.new(2), labels.new(3))
    with pytest.raises(ValueError, match="zip"):
        labels.channels()


@pytest.mark.parametrize("seed", range(5))
def test_unions_are_the_connected_components(seed):
    """Against an independent way: powers of the adjacency matrix."""
    random = np.random.default_rng(seed)
    count = 30
    labels, linked = Labels(), np.eye(count, dtype=bool)
    labels.new(count)
    for one, other in random.integers(0, count, (20, 2)):
        labels.unify(np.array([one]), np.array([other]))
        linked[one, other] = linked[other, one] = True
    reached = np.linalg.matrix_power(linked.astype(float), count) > 0
    channels, found = labels.channels()
    np.testing.assert_array_equal(channels[:, None] == channels, reached)
    assert found == len(np.unique(reached, axis=0))


def test_a_weight_noted_twice_has_the_channels_of_both_calls():
    labels = Labels()
    graph = trace(two_convolutions())
    node = graph.nodes[0]
    a, b = labels.new(2), labels.new(2)
    assert labels.known(node, "kernel", -2) is None
    assert labels.note(node, "kernel", -2, a, READ) is a
    assert labels.note(node, "kernel", -2, b, READ) is a
    assert labels.known(node, "kernel", -2) is a
    assert labels.channels()[1] == 2


# Coupling


def test_slices_of_two_convolutions():
    coupling = couple(trace(two_convolutions()))
    slices = [(s.layer, s.weight, s.axis, s.channels.tolist(), s.role) for s in coupling.slices]
    assert slices == [
        ("a", "kernel", -1, [0, 1, 2, 3], "produced"),
        ("a", "bias", -1, [0, 1, 2, 3], "following"),
        ("b", "kernel", -2, [0, 1, 2, 3], "read"),
        ("b", "kernel", -1, [4, 5, 6], "produced"),
        ("b", "bias", -1, [4, 5, 6], "following"),
    ]
    assert coupling.count == 7


def test_groups_of_two_convolutions():
    model = two_convolutions()
    assert groups_of(model) == {"a": 4, "b": (3, "the model gives it out")}
    first, second = couple(trace(model)).groups
    assert first.layers == ("a",)
    assert first.size == 4
    assert first.channels.tolist() == [0, 1, 2, 3]
    assert second.channels.tolist() == [4, 5, 6]


def test_edges_of_two_convolutions():
    graph = trace(two_convolutions())
    coupling = couple(graph)
    edges = {edge.name: (axis, c.tolist()) for edge, (axis, c) in coupling.edges.items()}
    assert edges == {
        "a": (-1, [0, 1, 2, 3]),
        "pool": (-1, [0, 1, 2, 3]),
        "b": (-1, [4, 5, 6]),
    }


def test_kept_positions():
    narrowing = narrowed(two_convolutions(), [1, 2])
    cuts = {
        key: {axis: at.tolist() for axis, at in axes.items()}
        for key, axes in narrowing.cuts.items()
    }
    assert cuts == {
        ("a", "kernel"): {-1: [0, 3]},
        ("a", "bias"): {-1: [0, 3]},
        ("b", "kernel"): {-2: [0, 3]},
    }


def test_kept_positions_of_channels_that_appear_many_times():
    narrowing = narrowed(flattened(), [0, 2])
    positions = narrowing.cuts["head", "kernel"][-2]
    assert positions.tolist() == [i for i in range(36) if i % 4 in (1, 3)]


def test_nothing_is_cut_where_all_channels_stay():
    narrowing = narrowed(two_convolutions(), [])
    assert narrowing.cuts == {}
    assert narrowing.flops() == total_flops(narrowing.graph)
    assert narrowing.parameters() == two_convolutions().count_params()


def test_kept_positions_of_two_axes_of_one_weight():
    def cut(axis, channels):
        return Slice("layer", "kernel", axis, np.array(channels), READ)

    coupling = Coupling((cut(-2, [0, 1]), cut(-1, [1, 2, 1])), {}, (), 3)
    cuts = coupling.kept_positions(np.array([True, False, True]))
    assert {axis: at.tolist() for axis, at in cuts["layer", "kernel"].items()} == {-2: [0], -1: [1]}


def test_edge_shape():
    narrowing = narrowed(two_convolutions(), [1, 2])
    shapes = {edge.name: narrowing.shape(edge) for edge in narrowing.graph.edges}
    assert shapes == {
        "image": (None, 6, 6, 2),
        "a": (None, 4, 4, 2),
        "pool": (None, 2, 2, 2),
        "b": (None, 2, 2, 3),
    }


def test_edge_shape_of_channels_that_appear_many_times():
    narrowing = narrowed(flattened(), [3])
    shapes = {edge.name: narrowing.shape(edge) for edge in narrowing.graph.edges}
    assert shapes["flatten"] == (None, 27)


def test_a_group_is_ordered_by_first_positions():
    groups = couple(trace(channel_cases.CASES["residual"].build())).groups
    assert groups[0].channels.tolist() == sorted(groups[0].channels.tolist())


def test_a_layer_with_channels_of_two_groups_numbers_their_names():
    inputs = keras.Input((5,), name="vector")
    x = layers.Dense(8, name="a")(inputs)
    y = layers.Dense(3, name="out")(x[..., 4:])
    model = keras.Model(inputs, [x[..., :4], y], name="halves")
    given_out = "the model gives it out"
    assert groups_of(model) == {"a": (4, given_out), "a (2)": 4, "out": (3, given_out)}


def test_no_part_of_a_split_can_lose_all_of_its_channels():
    """Parts are groups of their own, and of each group one channel stays."""
    inputs = keras.Input((6, 6, 3), name="image")
    left, right = ops.split(layers.Conv2D(8, 3, name="a")(inputs), [2], axis=-1)
    left = layers.Conv2D(4, 1, activation="relu", name="left")(left)
    x = ops.concatenate([left, layers.Conv2D(4, 1, name="right")(right)], axis=-1)
    model = models.randomize(keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x)))
    groups = groups_of(model)
    assert (groups["a"], groups["a (2)"]) == (2, 6)
    small = assert_removed_is_masked(model, 0.99).small
    assert [small.get_layer(name).kernel.shape[-2] for name in ("left", "right")] == [1, 1]


def test_every_channel_of_a_group_has_one_reason_the_first():
    inputs = keras.Input((5,), name="vector")
    x = layers.Dense(8, name="a")(inputs)
    x = layers.Softmax(name="first")(x) + layers.UnitNormalization(name="second")(x)
    assert groups_of(keras.Model(inputs, x))["a"] == (8, "'first' (softmax) mixes them")


def test_analysis_leaves_the_model_alone():
    model = two_convolutions()
    weights = model.get_weights()
    names = [layer.name for layer in model.layers]
    couple(trace(model))
    assert [layer.name for layer in model.layers] == names
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


# Narrowing


def test_by_hand():
    """Weights of the smaller model are the rows and columns that stay."""
    model = two_convolutions()
    narrowing = narrowed(model, [0, 2])
    small = rebuild(narrowing.graph, narrowing=narrowing)
    a, b = model.get_layer("a").get_weights(), model.get_layer("b").get_weights()
    expected = [a[0][..., [1, 3]], a[1][[1, 3]], b[0][:, :, [1, 3]], b[1]]
    for weight, value in zip(small.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert small.get_layer("a").filters == 2
    # 2 * 3*3 * 2 in * 2 out * 16 positions, 8 values per window of 4, 2 * 2 in * 3 out * 4
    assert narrowing.flops() == total_flops(trace(small)) == 2 * 9 * 2 * 2 * 16 + 2 * 2 * 3 * 4
    assert narrowing.parameters() == small.count_params() == 9 * 2 * 2 + 2 + 2 * 3 + 3


def test_zeroed_is_removed():
    """Without masks: the weights of channels set to zero by hand."""
    model = two_convolutions()
    narrowing = narrowed(model, [0, 2])
    small = rebuild(narrowing.graph, narrowing=narrowing)
    layer = model.get_layer("a")
    for variable in layer.weights:
        value = keras.ops.convert_to_numpy(variable).copy()
        value[..., [0, 2]] = 0
        variable.assign(value)
    inputs = models.inputs_for(model)
    for actual, expected in zip(run(small, inputs), run(model, inputs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_of_the_model_that_is_built(name):
    """Whatever channels go, but the last of a group."""
    model = channel_cases.made(name)
    graph = trace(model)
    coupling = couple(graph)
    random = np.random.default_rng(0)
    keep = np.ones(coupling.count, bool)
    for group in coupling.groups:
        if not group.reason:
            gone = random.permutation(group.channels)[: random.integers(1, group.size)]
            keep[gone] = False
    narrowing = Narrowing(graph, coupling, keep)
    small = rebuild(graph, narrowing=narrowing)
    assert small.count_params() == narrowing.parameters()
    assert flops_of(small, model, models.inputs_for(model)) == narrowing.flops()
