"""Filter pruning as a user meets it: plan, fit, strip, shrink, export."""

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND, numpy
from export_helpers import randomized
from keras import layers
from pruning_network import compressed, data, fitted, masks, network, outputs, pruning, relative

import keras_compress as kc
from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.layers import FakeQuantConv2D, PrunableBatchNormalization, PrunableConv2D


def test_plan_lists_every_group_its_size_and_why_it_stays():
    plan = kc.plan(network(), {"compression": pruning(pruning_target=0.25)})
    found = {g.name: (g.layers, g.channels, g.kept, g.reason) for g in plan.groups}
    assert found == {
        "first": (("first", "back"), 16, 12, ""),
        "inner": (("inner",), 32, 24, ""),
        "last": (("last",), 16, 12, ""),
        "head": (("head",), 4, 4, "the model gives it out"),
    }
    assert "pruning" not in network().name and "why all are kept" in str(plan)
    assert plan.to_dict()["groups"][0]["kept"] == 12


def test_plan_predicts_parameters_and_flops_by_hand():
    plan = kc.plan(network(), {"compression": pruning(pruning_target=0.5)})
    sizes = {size.what: size for size in plan.sizes}

    def parameters(a, b, c):  # channels of the groups first, inner, last
        convolutions = 9 * 3 * a + a + 9 * a * b + b + a * b + a + 9 * a * c + c
        return convolutions + 4 * a + 4 * c + 4

    assert (sizes["parameters"].full, sizes["parameters"].now) == (
        parameters(16, 32, 16),
        parameters(8, 16, 8),
    )

    def flops(a, b, c):
        at_64 = 2 * 64 * (27 * a + 9 * a * b + a * b) + 64 * (a + a + b + a)
        return at_64 + 2 * 9 * (9 * a * c) + c + 2 * 4 * c

    assert (sizes["FLOPs"].full, sizes["FLOPs"].now) == (flops(16, 32, 16), flops(8, 16, 8))
    assert (sizes["filters"].full, sizes["filters"].now) == (16 + 32 + 16 + 16 + 4, 44)
    assert sizes["prunable channels"].level == 0.5


def test_layers_are_named_after_what_they_carry():
    model = compressed()
    assert type(model.get_layer("first")) is PrunableConv2D
    assert type(model.get_layer("inner_norm")) is PrunableBatchNormalization
    both = compressed(pruning(), {"algorithm": "quantization"}, data=data()[0])
    assert type(both.get_layer("first")) is FakeQuantConv2D
    kinds = [type(t).__name__ for t in both.get_layer("first").transforms_of("kernel")]
    assert kinds == ["ChannelMask", "SymmetricQuantizer"]


def test_stripped_is_smaller_and_computes_the_same():
    original = network()
    model = compressed(model=original)
    small = kc.strip(model)
    assert relative(outputs(small), outputs(model)) < 1e-5
    assert relative(outputs(small), outputs(original)) > 0.05
    plan = {size["what"]: size["now"] for size in model.plan["sizes"]}
    assert small.count_params() == plan["parameters"]
    assert kc.report(small).flops == plan["FLOPs"]
    assert small.get_layer("inner").filters == 16
    assert {type(layer).__module__.partition(".")[0] for layer in small.layers} == {"keras"}


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_like_keeps_the_shapes_and_zeroes_filters(level):
    original = network()
    model = compressed(pruning(schedule="baseline", pruning_target=level), model=original)
    twin = kc.strip(model, like=original)
    assert twin.count_params() == original.count_params()
    assert relative(outputs(twin), outputs(model)) < 1e-5


def test_like_refuses_statistics_over_masked_channels():
    inputs = keras.Input((5,))
    x = layers.LayerNormalization(name="norm")(layers.Dense(8)(inputs))
    original = keras.Model(inputs, layers.Dense(2)(x))
    model = compressed(model=original)
    with pytest.raises(ValueError, match="'norm'.*statistics"):
        kc.strip(model, like=original)
    assert kc.strip(compressed(pruning(pruning_target=0.5), model=original), like=original)


def test_l1_local_removes_the_smallest_filters():
    model = network()
    kernel = numpy(model.get_layer("last").kernel)
    expected = np.argsort(np.abs(kernel).sum((0, 1, 2)))[:8]
    pruned = compressed(
        pruning(schedule="baseline", filter_importance="L1", pruning_target=0.5), model=model
    )
    mask = masks(pruned)["last", "kernel", -1]
    assert sorted(np.flatnonzero(mask == 0)) == sorted(expected)
    assert np.array_equal(masks(pruned)["head", "kernel", -2], mask)
    assert np.array_equal(masks(pruned)["last", "bias", -1], mask)


def test_score_of_a_group_is_the_sum_over_its_filters():
    model = network()
    first, back = (numpy(model.get_layer(name).kernel) for name in ("first", "back"))
    norms = [np.sqrt((kernel**2).sum((0, 1, 2))) for kernel in (first, back)]
    expected = np.argsort(sum(norms))[:4]
    mask = masks(compressed(pruning(schedule="baseline", pruning_target=0.25), model=model))
    assert sorted(np.flatnonzero(mask["first", "kernel", -1] == 0)) == sorted(expected)
    assert np.array_equal(mask["first", "kernel", -1], mask["back", "kernel", -1])


def test_batch_norm_scale_ranks_by_gamma_and_leaves_other_groups():
    model = network()
    gamma = np.abs(numpy(model.get_layer("inner_norm").gamma))
    pruned = compressed(
        pruning(schedule="baseline", filter_importance="batch_norm_scale", pruning_target=0.5),
        model=model,
    )
    mask = masks(pruned)["first", "kernel", -1]
    assert sorted(np.flatnonzero(mask == 0)) == sorted(np.argsort(gamma)[:8])
    reasons = {group["name"]: group["reason"] for group in pruned.plan["groups"]}
    assert reasons["inner"].startswith("no batch normalization")


def test_random_is_reproducible_and_has_a_seed():
    first, again, other = (
        masks(
            compressed(pruning(schedule="baseline", filter_importance="random", random_seed=seed))
        )["inner", "kernel", -1]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_global_ranking_takes_from_groups_unequally():
    model = network()
    kernel = model.get_layer("inner").kernel
    kernel.assign(numpy(kernel) * np.where(np.arange(32) < 16, 1e-3, 1.0))
    pruned = compressed(
        pruning(schedule="baseline", all_weights=True, pruning_target=0.25), model=model
    )
    gone = {name: int((mask == 0).sum()) for name, mask in masks(pruned).items()}
    assert gone["inner", "kernel", -1] == 16  # a quarter of 64, all of them here
    assert gone["first", "kernel", -1] == gone["last", "kernel", -1] == 0


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize(
    ("key", "what"),
    [("pruning_flops_target", "FLOPs"), ("pruning_parameters_target", "parameters")],
)
def test_targets_are_reached_and_not_by_far_exceeded(key, what, is_global):
    model = compressed(pruning(schedule="baseline", all_weights=is_global, **{key: 0.4}))
    small = kc.strip(model)
    full = next(size["full"] for size in model.plan["sizes"] if size["what"] == what)
    now = kc.report(small).flops if what == "FLOPs" else small.count_params()
    assert 0.4 <= 1 - now / full < 0.5


def test_unreachable_targets_are_refused_with_numbers():
    config = {"compression": pruning(pruning_flops_target=0.9999)}
    with pytest.raises(kc.ConfigError, match=r"9\d\.\d% fewer FLOPs. Received: pruning_flops_t"):
        kc.plan(network(), config)


def test_two_targets_are_refused_with_numbers():
    config = {"compression": pruning(pruning_target=0.3, pruning_flops_target=0.4)}
    with pytest.raises(kc.ConfigError, match=r"pruning_target=0.3, pruning_flops_target=0.4"):
        kc.plan(network(), config)


def test_nothing_to_prune_is_refused_with_reasons():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Softmax()(layers.Dense(3, name="only")(inputs)))
    with pytest.raises(kc.ConfigError, match=r"with 1 groups of channels.*'only':.*softmax"):
        kc.plan(model, {"compression": pruning()})


def test_taylor_needs_a_schedule_that_trains_first():
    with pytest.raises(kc.ConfigError, match="begins with training.*level of 0.5 in epoch 0"):
        compressed(pruning(schedule="baseline", filter_importance="taylor"))


def test_a_start_above_the_target_is_refused():
    config = {"compression": pruning(pruning_target=0.3) | {"pruning_init": 0.4}}
    with pytest.raises(kc.ConfigError, match="pruning_init=0.4, pruning_target=0.3"):
        kc.plan(network(), config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prune_first_conv": False}, "a first convolution"),
        ({"prune_downsample_convs": False}, "is strided"),
        ({"round_to": 16}, "not more than `round_to`=16"),
    ],
)
def test_options_that_leave_groups_alone(options, reason):
    plan = kc.plan(network(), {"compression": pruning(**options)})
    assert any(reason in group.reason for group in plan.groups)
    left = [group for group in plan.groups if reason in group.reason]
    assert all(group.kept == group.channels for group in left)


def test_scopes_leave_whole_groups_alone():
    config = {"compression": pruning() | {"ignored_scopes": ["back"]}}
    reasons = {group.name: group.reason for group in kc.plan(network(), config).groups}
    assert reasons["first"] == "'back' is excluded by the scopes of the configuration"
    with pytest.raises(kc.ConfigError, match="nothing"):
        kc.plan(network(), {"compression": pruning() | {"ignored_scopes": ["nothing"]}})


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_kept_channels_are_multiples(round_to):
    plan = kc.plan(network(), {"compression": pruning(pruning_target=0.3, round_to=round_to)})
    assert all(g.kept % round_to == 0 for g in plan.groups if not g.reason)


def levels(history):
    return history.history["compression/pruning_level"]


@pytest.mark.parametrize(
    ("params", "kept"),
    [  # channels of the group `inner` that stay, of 32, epoch by epoch
        ({"schedule": "baseline", "num_init_steps": 1}, [32, 16, 16, 16]),
        # 32 * 0.5 ** (epoch / 2), rounded up
        ({"schedule": "exponential", "pruning_steps": 3}, [32, 23, 16, 16]),
    ],
)
def test_schedules_move_the_masks(params, kept):
    model = compressed(pruning(pruning_target=0.5, **params))
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(int(masks(model)["inner", "kernel", -1].sum()))
    )
    history = fitted(model, 4, callbacks=[kc.callbacks.Statistics(), record])
    assert seen == kept
    full = 16 + 32 + 16
    expected = [1 - (sum(-(-full_of * k // 32) for full_of in (16, 32, 16))) / full for k in kept]
    assert np.allclose(levels(history), expected, atol=0.02)
    assert history.history["compression/FLOPs_left"][-1] == kc.report(kc.strip(model)).flops


def test_resumed_training_has_the_same_masks_bit_for_bit(tmp_path):
    algorithm = pruning(pruning_target=0.6, pruning_steps=4, filter_importance="L2")
    original = network()
    whole = compressed(algorithm, model=original)
    fitted(whole, 5)
    first = compressed(algorithm, model=original)
    fitted(first, 2)
    first.save(tmp_path / "half.keras")
    second = keras.models.load_model(tmp_path / "half.keras")
    fitted(second, 3)
    expected, received = masks(whole), masks(second)
    assert expected.keys() == received.keys()
    assert all(np.array_equal(expected[key], received[key]) for key in expected)
    assert relative(outputs(second), outputs(whole)) < 1e-5
    assert second.progress["filter_pruning"]["level"] == 0.6


def test_saved_in_the_midst_of_an_epoch_the_masks_stay(tmp_path):
    model = compressed(pruning(pruning_target=0.6, pruning_steps=4))
    fitted(model, 2)
    before = masks(model)
    x, y = data()
    model.train_on_batch(x[:8], y[:8])  # one step into the third epoch, its masks not yet set
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert all(np.array_equal(before[key], mask) for key, mask in masks(again).items())


def test_the_level_never_falls_when_the_model_is_compiled_anew():
    model = compressed(pruning(pruning_target=0.5, pruning_steps=2))
    fitted(model, 3)
    before = masks(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    fitted(model, 1)
    assert {key: mask.sum() for key, mask in before.items()} == {
        key: mask.sum() for key, mask in masks(model).items()
    }


def test_masks_are_reversible_while_the_schedule_runs():
    model = compressed(pruning(pruning_target=0.5, pruning_steps=3))
    fitted(model, 2)
    kernel = model.get_layer("inner").raw_weight("kernel")
    was_off = np.flatnonzero(masks(model)["inner", "kernel", -1] == 0)
    values = numpy(kernel).copy()
    values[..., was_off] *= 100
    kernel.assign(values)
    algorithm = model.config.algorithms[0]
    algorithm.begin_epoch(model, 2)
    assert masks(model)["inner", "kernel", -1][was_off].all()


def test_taylor_prunes_by_gradients():
    model = compressed(
        pruning(filter_importance="taylor", pruning_target=0.5, pruning_steps=2, num_init_steps=1)
    )
    fitted(model, 3)
    mask = model.get_layer("inner").transforms_of("kernel")[0]
    assert numpy(mask.score).min() >= 0 and numpy(mask.score).max() > 0
    assert mask.mask(-1).sum() == 16


@pytest.mark.parametrize("prune_batch_norms", [True, False])
def test_taylor_sees_through_batch_normalization(prune_batch_norms):
    """Whatever their norm: the channels go that nothing behind the batch normalization reads.

    Behind one, the loss does not depend on the size of a filter, and the sum of its gradients times
    its weights is zero but for rounding. That of the scale is not.
    """
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, name="conv")(inputs))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    model = randomized(keras.Model(inputs, layers.Dense(4, name="head")(x)))
    unread = np.array([0, 3, 4, 6])
    kernel = numpy(model.get_layer("head").kernel).copy()
    kernel[unread] = 0
    model.get_layer("head").kernel.assign(kernel)
    conv = numpy(model.get_layer("conv").kernel).copy()
    conv[..., unread] *= 10
    model.get_layer("conv").kernel.assign(conv)
    options = {"filter_importance": "taylor", "pruning_target": 0.5, "num_init_steps": 1}
    options |= {"schedule": "baseline", "prune_batch_norms": prune_batch_norms}
    pruned = compressed(pruning(**options), model=model)
    fitted(pruned, 2, keras.optimizers.SGD(1e-6))
    assert np.array_equal(np.flatnonzero(masks(pruned)["conv", "kernel", -1] == 0), unread)


def test_taylor_masks_no_scale_that_is_not_there():
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(scale=False, name="norm")(layers.Conv2D(8, 3)(inputs))
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    options = {"filter_importance": "taylor", "num_init_steps": 1, "prune_batch_norms": False}
    found = masks(compressed(pruning(**options), model=model))
    assert ("norm", "beta", -1) in found and ("norm", "gamma", -1) not in found


def test_masks_that_disagree_are_refused():
    model = compressed()
    mask = model.get_layer("inner").transforms_of("kernel")[0]
    mask.set_mask(-1, np.arange(32) % 2)
    with pytest.raises(ValueError, match="Expected masks that agree.*'inner'"):
        kc.strip(model)


def test_report_says_what_the_masks_leave():
    model = compressed()
    sizes = {size.what: size for size in kc.report(model).sizes}
    small = kc.report(kc.strip(model))
    assert (sizes["FLOPs"].now, sizes["parameters"].now) == (small.flops, small.parameters)
    assert sizes["FLOPs"].full == kc.report(network()).flops == kc.report(model).flops
    assert small.sizes == () and "current" in str(kc.report(model))


def test_an_unpruned_model_keeps_everything():
    model = compressed(pruning(pruning_target=0.5))
    assert MaskedGraph.of(model.graph()).keep.all()
    assert kc.strip(model).count_params() == network().count_params()


def test_pruning_and_quantization_in_one_fit_and_one_file(tmp_path):
    model = compressed(
        {"algorithm": "quantization"},
        pruning(pruning_target=0.5, pruning_steps=2, round_to=8),
        data=data()[0],
    )
    history = fitted(model, 3, callbacks=[kc.callbacks.Statistics()])
    assert np.isfinite(history.history["loss"]).all()
    small = kc.strip(model)
    assert relative(outputs(small), outputs(model)) < 1e-5
    if BACKEND == "tensorflow":
        report = kc.export(model, tmp_path / "model.xml", data=data()[0])
        assert report.relative < 2e-2  # one rounding step, where a sum lies between two
        assert report.eight_bit_layers == 5
        kc.export(network(), tmp_path / "float.xml", verify=False)
        sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("model", "float")]
        assert sizes[0] < 0.5 * 0.5 * sizes[1]


def test_quantizer_ranges_are_cut_too():
    model = compressed(
        pruning(pruning_target=0.5, schedule="baseline"),
        {"algorithm": "quantization"},
        data=data()[0],
    )
    on = masks(model)["inner", "kernel", -1] > 0
    before = numpy(model.get_layer("inner").transforms_of("kernel")[1].range_variables[0])
    after = kc.shrink(model).get_layer("inner").transforms_of("kernel")[1].range_variables[0]
    assert np.array_equal(numpy(after), before[..., on])
