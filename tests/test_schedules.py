"""Schedules against closed forms, numbers worked out by hand and their defining conditions."""

import dataclasses
import doctest
import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keras_compress import schedules
from keras_compress.schedules import (
    SCHEDULES,
    Baseline,
    Exponential,
    ExponentialWithBias,
    Schedule,
)

every_schedule = pytest.mark.parametrize("kind", sorted(SCHEDULES))
levels = st.floats(0, 1, exclude_max=True)
kinds = st.sampled_from(sorted(SCHEDULES))
property_test = settings(deadline=None, derandomize=True, max_examples=300)


def schedule(kind, init=0.1, target=0.6, num_init_steps=2, pruning_steps=5):
    return SCHEDULES[kind](init, target, num_init_steps, pruning_steps)


def course(of, epochs):
    return [of(epoch) for epoch in range(epochs)]


def test_configuration_names():
    assert {
        "baseline": Baseline,
        "exponential": Exponential,
        "exponential_with_bias": ExponentialWithBias,
    } == SCHEDULES


def test_examples_in_the_docstrings():
    result = doctest.testmod(schedules)
    assert result.failed == 0 and result.attempted == 10


def test_baseline_by_hand():
    assert course(schedule("baseline"), 6) == [0, 0, 0.6, 0.6, 0.6, 0.6]
    assert course(schedule("baseline", num_init_steps=0), 3) == [0.6, 0.6, 0.6]


def test_exponential_by_hand():
    # Density halves in every epoch: 1, 1/2, 1/4, 1/8.
    of = schedule("exponential", init=0, target=0.875, num_init_steps=2, pruning_steps=4)
    assert course(of, 8) == [0, 0, 0, 0.5, 0.75, 0.875, 0.875, 0.875]
    # From 0.8 by a factor of 3/4: 0.8, 0.6, 0.45, 0.3375.
    of = schedule("exponential", init=0.2, target=0.6625, num_init_steps=1, pruning_steps=4)
    assert course(of, 6) == pytest.approx([0, 0.2, 0.4, 0.55, 0.6625, 0.6625], abs=1e-15)


def test_exponential_takes_fractions_of_an_epoch():
    of = schedule("exponential", init=0, target=0.75, num_init_steps=1, pruning_steps=3)
    assert of(0.999) == 0
    assert of(1.5) == pytest.approx(1 - math.sqrt(0.5), abs=1e-15)
    assert of(2.999) < of(3.0) == 0.75


# Roots of y^(1/8) - c*y + c - 1 found with numpy.roots, then a*exp(-k*i) + b at quarters.
@pytest.mark.parametrize(
    "init, target, expected",
    [
        (0.0, 0.8, [0, 0.750007, 0.796887, 0.799817, 0.8]),
        (0.0, 0.5, [0, 0.468754, 0.498054, 0.499886, 0.5]),
        (0.1, 0.5, [0.1, 0.460955, 0.496218, 0.499663, 0.5]),
        (0.3, 0.5, [0.3, 0.422618, 0.472045, 0.491969, 0.5]),
        (0.35, 0.5, [0.35, 0.397895, 0.438062, 0.471748, 0.5]),
        (0.357, 0.5, [0.357, 0.392964, 0.428785, 0.464464, 0.5]),
    ],
)
def test_exponential_with_bias_golden_numbers(init, target, expected):
    of = schedule("exponential_with_bias", init, target, num_init_steps=1, pruning_steps=5)
    assert course(of, 8) == pytest.approx([0, *expected, target, target], abs=6e-7)


def roots_inside(init, target):
    """Count the roots in (0, 1) of u - c*u^8 + c - 1, u = y^(1/8), the equation as published."""
    c = (0.75 * target - init) / (target - init)
    u = np.linspace(0, 1, 200_001)[:-1]  # without the trivial root
    values = u - c * u**8 + c - 1
    return int(np.count_nonzero(np.diff(np.sign(values)) != 0))


def test_a_decay_exists_below_five_sevenths_of_the_target_only():
    grid = [Fraction(i, 20) for i in range(20)]
    pairs = [(i, t) for t in grid for i in grid if i < t] + [
        (Fraction(712, 1000) * t, t) for t in grid[1:]
    ]
    found = 0
    for init, target in pairs:
        exists = 7 * init < 5 * target
        assert roots_inside(float(init), float(target)) == exists
        of = schedule("exponential_with_bias", float(init), float(target), 0, 9)
        assert (of.decay > 0) == exists
        found += exists
    assert 0 < found < len(pairs)


@property_test
@given(target=levels, ratio=st.floats(0, 0.713))
def test_exponential_with_bias_meets_its_three_conditions(target, ratio):
    assume(target > 1e-6)
    init = ratio * target
    of = schedule("exponential_with_bias", init, target, num_init_steps=0, pruning_steps=9)
    assert of(0) == init and of(8) == target
    assert of(1) == pytest.approx(0.75 * target, rel=1e-9)
    # An exponential with a bias: the steps shrink by one factor.
    steps = np.diff(course(of, 9))
    assert steps[1:] * steps[0] == pytest.approx(steps[:-1] * steps[1], abs=1e-12 * target**2)
    assert steps[1] < steps[0]


@pytest.mark.parametrize("target", [0.07, 0.35, 0.7, 0.98])
def test_exponential_with_bias_turns_into_a_straight_line(target):
    edge = 5 / 7 * target
    for init in (edge * (1 - 1e-12), edge, edge * (1 + 1e-12), 0.72 * target, 0.9 * target):
        of = schedule("exponential_with_bias", init, target, num_init_steps=0, pruning_steps=9)
        assert course(of, 9) == pytest.approx(np.linspace(init, target, 9), abs=1e-9)


@every_schedule
def test_one_epoch_of_ramp_is_at_the_target_at_once(kind):
    of = schedule(kind, pruning_steps=1)
    assert course(of, 5) == [0, 0, 0.6, 0.6, 0.6]
    assert [of.frozen(epoch) for epoch in range(5)] == [False, False, False, True, True]


@every_schedule
@pytest.mark.parametrize("level", [0, 0.3, 0.99])
def test_equal_levels_are_constant(kind, level):
    of = schedule(kind, init=level, target=level)
    assert course(of, 10) == [0, 0, *[level] * 8]


@every_schedule
def test_level_before_the_ramp_is_zero_and_starts_at_init(kind):
    of = schedule(kind, init=0.4, num_init_steps=3)
    assert course(of, 3) == [0, 0, 0] and of(2.9) == 0
    assert of(3) == (0.6 if kind == "baseline" else 0.4)


@every_schedule
def test_masks_are_frozen_after_the_target_is_set(kind):
    of = schedule(kind, num_init_steps=2, pruning_steps=3)
    reached = 2 if kind == "baseline" else 4
    assert of.target_epoch == reached
    assert [of.frozen(epoch) for epoch in range(8)] == [epoch > reached for epoch in range(8)]
    assert of(reached) == 0.6 and of(reached - 1) < 0.6


@property_test
@given(
    kind=kinds,
    pair=st.tuples(levels, levels).map(sorted),
    before=st.integers(0, 20),
    steps=st.integers(1, 200),
    fractions=st.lists(st.floats(0, 300), max_size=20),
)
def test_levels_never_fall_nor_exceed_the_target(kind, pair, before, steps, fractions):
    init, target = pair
    of = schedule(kind, init, target, before, steps)
    values = [of(epoch) for epoch in sorted([*range(before + steps + 2), *fractions])]
    assert all(type(value) is float and 0 <= value <= target for value in values)
    assert np.all(np.diff(values) >= -1e-15)
    assert values[-1] == target and of(10**9) == target
    assert all(init <= of(epoch) for epoch in range(before, before + steps))
    assert all(of(e) == target for e in range(before + steps + 5) if of.frozen(e))


@every_schedule
def test_schedules_are_values(kind):
    of = schedule(kind)
    of(3)
    assert of == schedule(kind) and hash(of) == hash(schedule(kind))
    assert of != schedule(kind, init=0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        of.target = 0.7


def test_a_subclass_without_a_name_is_not_registered():
    before = dict(SCHEDULES)

    class Unnamed(Schedule):
        pass

    assert before == SCHEDULES and list(inspect.signature(Unnamed).parameters) == [
        "init",
        "target",
        "num_init_steps",
        "pruning_steps",
    ]


@every_schedule
@pytest.mark.parametrize("name", ["init", "target"])
@pytest.mark.parametrize("level", [-0.1, 1, 1.5, math.nan])
def test_levels_are_checked(kind, name, level):
    with pytest.raises(ValueError, match=rf"level in \[0, 1\). Received: {name}={level}"):
        schedule(kind, **{name: level})


@every_schedule
def test_init_above_the_target_is_refused(kind):
    with pytest.raises(ValueError, match=r"not above the target.*init=0\.7, target=0\.6"):
        schedule(kind, init=0.7)


@every_schedule
@pytest.mark.parametrize(
    "name, steps, smallest",
    [
        ("num_init_steps", -1, 0),
        ("num_init_steps", 1.5, 0),
        ("pruning_steps", 0, 1),
        ("pruning_steps", 2.0, 1),
    ],
)
def test_numbers_of_epochs_are_checked(kind, name, steps, smallest):
    with pytest.raises(ValueError, match=f"at least {smallest}. Received: {name}={steps}"):
        schedule(kind, **{name: steps})


@every_schedule
@pytest.mark.parametrize("epoch", [-1, -0.5, math.nan])
def test_epochs_are_checked(kind, epoch):
    for call in (schedule(kind), schedule(kind).frozen):
        with pytest.raises(ValueError, match=f"at least 0. Received: epoch={epoch}"):
            call(epoch)
