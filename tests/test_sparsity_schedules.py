"""Sparsity schedules against numbers worked out by hand, TFMOT's, and what defines them."""

import dataclasses
import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_compress import schedules, sparsity_schedules
from keras_compress.sparsity_schedules import (
    SPARSITY_SCHEDULES,
    Adaptive,
    AdaptiveState,
    Exponential,
    Multistep,
    Polynomial,
    SparsitySchedule,
)

property_test = settings(deadline=None, derandomize=True, max_examples=300)
levels = st.floats(0, 1, exclude_max=True)
ARGUMENTS = {
    "polynomial": {"init": 0.1, "target": 0.6, "target_epoch": 5},
    "exponential": {"init": 0.1, "target": 0.6, "target_epoch": 5},
    "multistep": {"steps": (2, 5), "levels": (0.1, 0.3, 0.6)},
    "adaptive": {"init": 0.1, "target": 0.6},
}
every_schedule = pytest.mark.parametrize("kind", sorted(ARGUMENTS))
every_function = pytest.mark.parametrize("kind", ["exponential", "multistep", "polynomial"])
every_ramp = pytest.mark.parametrize("kind", ["exponential", "polynomial"])


def schedule(kind, **kwargs):
    return SPARSITY_SCHEDULES[kind](**ARGUMENTS[kind] | kwargs)


def course(of, epochs):
    return [of(epoch) for epoch in range(epochs)]


def test_configuration_names():
    assert {
        "polynomial": Polynomial,
        "exponential": Exponential,
        "multistep": Multistep,
        "adaptive": Adaptive,
    } == SPARSITY_SCHEDULES


def test_examples_in_the_docstrings():
    result = doctest.testmod(sparsity_schedules)
    assert result.failed == 0 and result.attempted == 11


@pytest.mark.parametrize(
    "power, concave, expected",
    [
        # 0.1 to 0.9 in four epochs: shares 0, 1/4, 1/2, 3/4.
        (1, True, [0.1, 0.3, 0.5, 0.7, 0.9, 0.9]),
        (1, False, [0.1, 0.3, 0.5, 0.7, 0.9, 0.9]),
        (2, True, [0.1, 0.45, 0.7, 0.85, 0.9, 0.9]),
        (2, False, [0.1, 0.15, 0.3, 0.55, 0.9, 0.9]),
        (3, True, [0.1, 0.5625, 0.8, 0.8875, 0.9, 0.9]),
        (3, False, [0.1, 0.1125, 0.2, 0.4375, 0.9, 0.9]),
        (0.5, True, [0.1, 0.2071796770, 0.3343145751, 0.5, 0.9, 0.9]),
        (0.5, False, [0.1, 0.5, 0.6656854249, 0.7928203230, 0.9, 0.9]),
        (0, True, [0.1, 0.1, 0.1, 0.1, 0.9, 0.9]),
        (0, False, [0.9, 0.9, 0.9, 0.9, 0.9, 0.9]),
    ],
)
def test_polynomial_by_hand(power, concave, expected):
    of = schedule("polynomial", init=0.1, target=0.9, target_epoch=4, power=power, concave=concave)
    assert course(of, 6) == pytest.approx(expected, abs=1e-10)


def test_polynomial_defaults_are_nncfs():
    of = Polynomial(init=0, target=0.5, target_epoch=90)
    # 0.5 - 0.5 * (1 - e/90)^0.9, in 30 decimal digits by Python's decimal
    assert [of(e) for e in (0, 1, 45, 89, 90, 91)] == pytest.approx(
        [0, 0.0050027892, 0.2320566344, 0.4912873204, 0.5, 0.5], abs=1e-9
    )


@pytest.mark.parametrize("step, value", [(100, 0.2), (102, 0.4928), (105, 0.725), (110, 0.8)])
def test_cubic_decay_is_tfmots(step, value):
    # PolynomialDecay(0.2, 0.8, begin_step=100, end_step=110, power=3): the numbers of its own test,
    # tensorflow_model_optimization/python/core/sparsity/keras/pruning_schedule_test.py.
    of = Polynomial(init=0.2, target=0.8, target_epoch=10, power=3, concave=True)
    assert of(step - 100) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("begin, end, init, target", [(0, 2000, 0.5, 0.9), (0, 7, 0, 0.8)])
def test_cubic_decay_is_tfmots_formula_at_every_step(begin, end, init, target):
    of = Polynomial(init=init, target=target, target_epoch=end, power=3)
    for step in range(end + 3):
        p = min(1.0, max(0.0, (step - begin) / (end - begin)))
        assert of(step) == pytest.approx((init - target) * (1 - p) ** 3 + target, abs=1e-12)


def test_polynomial_moves_with_every_step():
    of = schedule("polynomial", init=0, target=0.8, target_epoch=2, power=2)
    # Five steps per epoch: shares 0, 0.1, ..., 1.
    values = [of(epoch + step / 5) for epoch in range(3) for step in range(5)]
    expected = [0, 0.152, 0.288, 0.408, 0.512, 0.6, 0.672, 0.728, 0.768, 0.792, *[0.8] * 5]
    assert values == pytest.approx(expected, abs=1e-12)


def test_exponential_by_hand():
    # Density halves: 1, 1/2, 1/4, 1/8.
    of = schedule("exponential", init=0, target=0.875, target_epoch=3)
    assert course(of, 5) == [0, 0.5, 0.75, 0.875, 0.875]
    # From 0.8 by a factor of 3/4: 0.8, 0.6, 0.45, 0.3375.
    of = schedule("exponential", init=0.2, target=0.6625, target_epoch=3)
    assert course(of, 5) == pytest.approx([0.2, 0.4, 0.55, 0.6625, 0.6625], abs=1e-15)
    assert of(1.5) == pytest.approx(1 - 0.8 * 0.75**1.5, abs=1e-15)


def test_exponential_is_the_curve_of_pruning():
    pruning = schedules.Exponential(0.1, 0.6, num_init_steps=0, pruning_steps=6)
    assert course(schedule("exponential"), 8) == course(pruning, 8)


@pytest.mark.parametrize("init", [1 - 1e-3, 1 - 1e-9, math.nextafter(1, 0)])
def test_levels_close_to_one(init):
    target = math.nextafter(1, 0)
    for kind in ("exponential", "polynomial"):
        values = course(schedule(kind, init=init, target=target), 7)
        assert values[0] == init and values[5:] == [target, target]
        assert all(init <= value <= target for value in values)


def test_multistep_by_hand():
    of = schedule("multistep", steps=[5, 2, 2.5], levels=[0.1, 0.2, 0.4, 0.3])
    assert of.steps == (2, 2.5, 5) and of.levels == (0.1, 0.2, 0.4, 0.3)
    assert course(of, 7) == [0.1, 0.1, 0.2, 0.4, 0.4, 0.3, 0.3]
    assert of(1.999) == 0.1 and of(2.499) == 0.2 and of(2.5) == 0.4
    assert of.target == 0.3 and of.target_epoch == 5


def test_multistep_defaults_of_nncf():
    of = Multistep(steps=(90,), levels=(0.1, 0.5))
    assert [of(e) for e in (0, 89, 90, 91)] == [0.1, 0.1, 0.5, 0.5]


def test_multistep_at_the_edges():
    assert course(Multistep(steps=(), levels=(0.4,)), 2) == [0.4, 0.4]
    assert Multistep(steps=(), levels=(0.4,)).target_epoch == 0
    assert course(Multistep(steps=(0,), levels=(0.1, 0.5)), 2) == [0.5, 0.5]
    assert course(Multistep(steps=(1, 1), levels=(0.1, 0.2, 0.5)), 3) == [0.1, 0.5, 0.5]


def adaptive_course(of, reached):
    state, found = of.start, []
    for sparsity in reached:
        state = of.next(state, sparsity)
        found.append(tuple(state))
    return found


def test_adaptive_by_hand():
    of = Adaptive(init=0.1, target=0.22, patience=1)
    assert of.start == (0.1, 0)
    assert adaptive_course(of, [0.0699, 0.07, 0.11, 0.12, 0.9, 0.16, 0.17, 0.19, 1]) == [
        (0.1, 0),  # short by more than 0.03
        (0.15, 0),
        (0.15, 0),
        (0.2, 0),
        (0.22, 0),
        (0.22, 0),
        (0.22, 0),
        (0.22, 0),
        (0.22, 0),
    ]


def test_adaptive_waits():
    of = Adaptive(init=0.1, target=0.3, patience=2)
    # An epoch that falls short does not start the count anew.
    assert adaptive_course(of, [0.1, 0.0, 0.1, 0.0, 0.12, 0.15, 0.2]) == [
        (0.1, 1),
        (0.1, 1),
        (0.15, 0),
        (0.15, 0),
        (0.15, 1),
        (0.2, 0),
        (0.2, 1),
    ]


def test_adaptive_without_patience_rises_in_every_epoch():
    found = adaptive_course(Adaptive(init=0, target=1 - 1e-9, patience=0), [0] * 20)
    assert [level for level, _ in found] == [i / 20 for i in range(1, 20)] + [1 - 1e-9]


@property_test
@given(
    pair=st.tuples(levels, levels).map(sorted),
    patience=st.integers(0, 3),
    reached=st.lists(st.floats(0, 1), max_size=30),
)
def test_adaptive_is_the_loop_of_nncf_on_exact_decimals(pair, patience, reached):
    init, target = pair
    of = Adaptive(init=init, target=target, patience=patience)
    level, bad = init, 0
    for sparsity, state in zip(reached, adaptive_course(of, reached), strict=True):
        if abs(sparsity - (level - 0.03)) > 1e-9:
            bad += sparsity >= level - 0.03
        else:  # too close to tell
            level, bad = state
            continue
        if bad >= patience:
            level, bad = min(level + 0.05, target), 0
        assert state == (pytest.approx(level, abs=1e-10), bad)
        assert init <= state[0] <= target and type(state[0]) is float


def test_adaptive_remembers_nothing():
    of = Adaptive(init=0.1, target=0.5, patience=2)
    state = AdaptiveState(0.3, 1)
    assert of.next(state, 0.3) == of.next(state, 0.3) == (0.35, 0)
    assert of.next(AdaptiveState(*[0.3, 0]), np.float32(0.3)) == (0.3, 1)
    assert state == (0.3, 1)


@property_test
@given(
    kind=st.sampled_from(["exponential", "polynomial"]),
    pair=st.tuples(levels, levels).map(sorted),
    target_epoch=st.one_of(st.integers(0, 200), st.floats(0, 200)),
    fractions=st.lists(st.floats(0, 300), max_size=20),
    power=st.floats(0, 10),
    concave=st.booleans(),
)
def test_ramps_never_fall_nor_leave_their_bounds(
    kind, pair, target_epoch, fractions, power, concave
):
    init, target = pair
    extra = {"power": power, "concave": concave} if kind == "polynomial" else {}
    of = schedule(kind, init=init, target=target, target_epoch=target_epoch, **extra)
    values = [of(epoch) for epoch in sorted([*range(10), *fractions])]
    assert all(type(value) is float and init <= value <= target for value in values)
    assert np.all(np.diff(values) >= -1e-15)
    assert of(target_epoch) == target and of(10**9) == target and of(math.inf) == target
    if target_epoch > 0 and (kind == "exponential" or power > 0):
        assert of(0) == pytest.approx(init, abs=1e-15)


@property_test
@given(
    steps=st.lists(st.integers(0, 20), max_size=6),
    data=st.data(),
    epoch=st.floats(0, 25),
)
def test_multistep_counts_the_steps_that_have_passed(steps, data, epoch):
    values = data.draw(st.lists(levels, min_size=len(steps) + 1, max_size=len(steps) + 1))
    of = Multistep(steps=steps, levels=values)
    assert of(epoch) == values[sum(step <= epoch for step in steps)]


@every_ramp
def test_target_epoch_zero_is_at_the_target_at_once(kind):
    assert course(schedule(kind, target_epoch=0), 3) == [0.6, 0.6, 0.6]


@every_ramp
@pytest.mark.parametrize("level", [0, 0.3, 0.99])
def test_equal_levels_are_constant(kind, level):
    assert course(schedule(kind, init=level, target=level), 8) == [level] * 8


@every_schedule
def test_masks_freeze_at_their_epoch(kind):
    of = schedule(kind, freeze_epoch=3)
    assert [of.frozen(e) for e in (0, 2, 2.99, 3, 3.5, 100)] == [False] * 3 + [True] * 3
    assert schedule(kind, freeze_epoch=0).frozen(0)
    assert not schedule(kind).frozen(10**9)
    if kind != "adaptive":  # the level does not care
        assert course(of, 8) == course(schedule(kind), 8)


@every_schedule
def test_schedules_are_values(kind):
    of = schedule(kind)
    assert of == schedule(kind) and hash(of) == hash(schedule(kind))
    assert of != schedule(kind, freeze_epoch=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        of.freeze_epoch = 8
    assert dataclasses.replace(of, freeze_epoch=7) == schedule(kind, freeze_epoch=7)


def test_a_subclass_without_a_name_is_not_registered():
    before = dict(SPARSITY_SCHEDULES)

    class Unnamed(SparsitySchedule):
        pass

    assert before == SPARSITY_SCHEDULES and not Unnamed().frozen(0)


@pytest.mark.parametrize("kind", ["adaptive", "exponential", "polynomial"])
@pytest.mark.parametrize("name", ["init", "target"])
@pytest.mark.parametrize("level", [-0.1, 1, 1.5, math.nan])
def test_levels_are_checked(kind, name, level):
    with pytest.raises(ValueError, match=rf"level in \[0, 1\). Received: {name}={level}"):
        schedule(kind, **{name: level})


@pytest.mark.parametrize("kind", ["adaptive", "exponential", "polynomial"])
def test_init_above_the_target_is_refused(kind):
    with pytest.raises(ValueError, match=r"not above the target.*init=0\.7, target=0\.6"):
        schedule(kind, init=0.7)


@every_schedule
@pytest.mark.parametrize("epoch", [-1, math.nan, "3"])
def test_freeze_epoch_is_checked(kind, epoch):
    with pytest.raises(
        ValueError, match=f"a number of at least 0. Received: freeze_epoch={epoch!r}"
    ):
        schedule(kind, freeze_epoch=epoch)


@pytest.mark.parametrize("name", ["target_epoch", "power"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, None])
def test_numbers_are_checked(name, value):
    with pytest.raises(ValueError, match=f"finite number of at least 0. Received: {name}={value}"):
        schedule("polynomial", **{name: value})


@pytest.mark.parametrize(
    "steps, values, message",
    [
        ((2,), (0.1,), r"one more level than steps. Received: steps=\(2,\), levels=\(0.1,\)"),
        ((), (), "one more level"),
        ((-1,), (0.1, 0.2), "finite number of at least 0. Received: step=-1"),
        ((math.inf,), (0.1, 0.2), "Received: step=inf"),
        ((2,), (0.1, 1), r"level in \[0, 1\). Received: level=1"),
    ],
)
def test_steps_and_levels_are_checked(steps, values, message):
    with pytest.raises(ValueError, match=message):
        Multistep(steps=steps, levels=values)


@pytest.mark.parametrize("patience", [-1, 1.5])
def test_patience_is_checked(patience):
    with pytest.raises(
        ValueError, match=f"whole number of at least 0. Received: patience={patience}"
    ):
        schedule("adaptive", patience=patience)


@pytest.mark.parametrize("reached", [-0.1, 1.1, math.nan])
def test_reached_sparsity_is_checked(reached):
    of = schedule("adaptive")
    with pytest.raises(ValueError, match=rf"sparsity in \[0, 1\]. Received: reached={reached}"):
        of.next(of.start, reached)


@every_function
@pytest.mark.parametrize("epoch", [-1, -0.5, math.nan])
def test_epochs_are_checked(kind, epoch):
    for call in (schedule(kind), schedule(kind).frozen):
        with pytest.raises(ValueError, match=f"at least 0. Received: epoch={epoch}"):
            call(epoch)
