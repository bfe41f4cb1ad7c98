"""The decisions of accuracy-aware training, without training: goal, search, result."""

import dataclasses
import math

import numpy as np
import pytest

from keras_compress.accuracy_aware import (
    AccuracyAwareParams,
    EpochResult,
    Goal,
    RateSearch,
)
from keras_compress.training.accuracy_result import AccuracyAwareResult

NEVER = 1.0  # a value that is always within the bound below


def params(**given):
    defaults = {"maximal_absolute_accuracy_degradation": 0.1, "patience_epochs": 0}
    return AccuracyAwareParams(**defaults | given)


def search(rate=0.5, best=None, within=None, lower=False, **given):
    given = params(**given)
    found = RateSearch(given, Goal.of(given, 1.0, lower))
    found.begin(rate, best, within)
    return found


def rates(found, value_at, most=40):
    """Return the rates that a search trains at, of a metric that is a function of the rate."""
    seen = []
    for _ in range(most):
        if found.due and found.move() is None:
            break
        seen.append(found.rate)
        found.observe(value_at(found.rate))
    return seen


# The goal


@pytest.mark.parametrize(
    ("key", "value", "baseline", "lower", "bound"),
    [
        ("maximal_absolute_accuracy_degradation", 0.02, 0.9, False, 0.88),
        ("maximal_absolute_accuracy_degradation", 0.02, 0.9, True, 0.92),
        ("maximal_relative_accuracy_degradation", 2, 0.5, False, 0.49),
        ("maximal_relative_accuracy_degradation", 2, 0.5, True, 0.51),
        ("maximal_relative_accuracy_degradation", 10, -2.0, False, -2.2),
        ("maximal_absolute_accuracy_degradation", -0.01, 0.9, False, 0.91),
    ],
)
def test_the_bound(key, value, baseline, lower, bound):
    goal = Goal.of(AccuracyAwareParams(**{key: value}), baseline, lower)
    assert goal.bound == pytest.approx(bound)
    inside, outside = (bound - 1e-3, bound + 1e-3)[:: 1 if lower else -1]
    assert goal.within(inside) and not goal.within(outside)
    assert goal.margin(inside) == pytest.approx(1e-3)
    assert goal.margin(outside) == pytest.approx(-1e-3)


def test_float32_does_not_miss_the_bound_by_its_last_digit():
    goal = Goal(0.95, 0.94, False)
    assert float(np.float32(0.94)) < 0.94 and goal.within(float(np.float32(0.94)))
    assert not goal.within(math.nan)


def test_better():
    up, down = Goal(1, 1, False), Goal(1, 1, True)
    assert up.better(2, 1) and not up.better(1, 1) and not up.better(1, 2)
    assert down.better(1, 2) and not down.better(1, 1) and not down.better(2, 1)
    assert up.better(-9, None) and up.better(-9, math.nan)
    assert not up.better(math.nan, None) and not up.better(math.nan, math.nan)


def epoch(number, rate, value, within, complete=True):
    return EpochResult(number, rate, value, 0.0, 0.1, within, complete)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        # (rate, value, within, complete): the highest rate within, then the value, then the first
        ([(0.1, 1.0, True, True), (0.3, 0.9, True, True), (0.5, 0.8, False, True)], 1),
        ([(0.3, 0.90, True, True), (0.3, 0.95, True, True), (0.3, 0.95, True, True)], 1),
        # none within: the lowest rate, then the value
        ([(0.5, 0.8, False, True), (0.2, 0.5, False, True), (0.2, 0.6, False, True)], 2),
        # incomplete epochs never count, unless there is nothing else
        ([(0.1, 1.0, True, True), (0.9, 1.0, False, False)], 0),
        ([(0.1, 1.0, False, False), (0.2, 0.5, False, False)], 1),
        ([(0.2, math.nan, False, True), (0.2, 0.1, False, True)], 1),
        ([(None, 0.7, False, True), (None, 0.8, False, True)], 1),
    ],
)
def test_the_best_epoch(rows, best):
    epochs = [epoch(number, *row) for number, row in enumerate(rows)]
    assert Goal(1.0, 0.85, False).best(epochs).epoch == best


# The search


def test_the_rate_is_bracketed_by_halved_steps():
    """0.69 is the highest rate within the bound."""
    found = search(best=NEVER)
    seen = rates(found, lambda rate: 1.0 if rate <= 0.69 else 0.0)
    # Up in steps of 0.1; 0.7 fails; half a step back is within, a quarter further too; 0.7 again
    # fails, and what would be next is below the least step.
    assert seen == pytest.approx([0.6, 0.7, 0.65, 0.675, 0.7])
    assert found.stopped == "the step fell below 0.025"
    # Up after down, down after up: the learning rate halves at each flip, the last one too.
    assert found.learning_rate_factor == 0.5**3


def test_metrics_to_be_minimised_mirror_it():
    found = search(best=0.0, lower=True)
    seen = rates(found, lambda rate: 0.0 if rate <= 0.69 else 2.0)
    assert seen == pytest.approx([0.6, 0.7, 0.65, 0.675, 0.7])


def test_a_rate_that_is_too_high_at_first():
    seen = rates(search(best=0.0), lambda rate: 1.0 if rate <= 0.23 else 0.0)
    # Down to 0.2, which is within; then from there in halved steps; 0.25 is above, 0.225 within.
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.25, 0.225])


def test_a_rate_known_to_be_within_is_not_tried_again():
    seen = rates(search(best=NEVER), lambda rate: 1.0 if rate <= 0.61 else 0.0)
    # From 0.65 down a step of 0.05 would be 0.6, which held already: the direction flips at once.
    assert seen == pytest.approx([0.6, 0.7, 0.65, 0.625])
    # The same with what was seen before the search began.
    seen = rates(search(0.5, best=0.0, within=0.4), lambda rate: 1.0 if rate <= 0.4 else 0.0)
    assert seen == pytest.approx([0.45, 0.425])


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_patience_counts_epochs_without_gain(patience):
    found = search(patience_epochs=patience)
    assert not found.due  # nothing has been seen at this rate
    for value in (0.1, 0.2, 0.3):  # gains
        found.observe(value)
        assert found.due == (patience == 0)
    for waited in range(1, patience + 1):
        found.observe(0.3)  # no gain
        assert found.due == (waited >= patience)
    found.move()
    assert found.rate == pytest.approx(0.4) and not found.due  # 0.3 is not within 0.9
    assert found.best is None and found.waited == 0


def test_the_best_value_at_a_rate_decides_not_the_last():
    found = search(patience_epochs=1)
    found.observe(0.95)
    found.observe(0.2)
    assert found.move() == pytest.approx(0.6)


def test_nan_is_not_within_the_bound():
    found = search()
    found.observe(math.nan)
    assert found.move() == pytest.approx(0.4)
    found.observe(math.nan)
    found.observe(0.95)
    assert found.move() == pytest.approx(0.45)


def test_rates_end_at_0_and_at_95_percent():
    found = search(0.8, best=NEVER)
    assert rates(found, lambda rate: 1.0) == pytest.approx([0.9, 0.95])
    assert found.stopped == "no higher rate is to be tried"
    found = search(0.15, best=0.0)
    assert rates(found, lambda rate: 0.0) == pytest.approx([0.05, 0.0])
    assert found.stopped == "there is no lower rate"


def test_steps_end_the_search():
    assert rates(search(best=NEVER, initial_compression_rate_step=0.01), lambda rate: 1.0) == []
    # A factor of 0 ends it with the first flip; with 1 only the number of epochs does.
    ends = search(best=NEVER, compression_rate_step_reduction_factor=0)
    assert rates(ends, lambda rate: float(rate < 0.65)) == pytest.approx([0.6, 0.7])
    goes_on = search(best=NEVER, compression_rate_step_reduction_factor=1)
    assert len(rates(goes_on, lambda rate: float(rate < 0.65), most=9)) == 9


def test_rates_that_cannot_be_reached():
    """The model can have rates below 0.72 only: the driver asks for another each time."""
    found, tried = search(0.6, best=NEVER), []
    model = 0.6
    while found.due and (wanted := found.move()) is not None:
        while wanted is not None and wanted >= 0.72:
            tried.append(wanted)
            wanted = found.unreachable(wanted, model)
        if wanted is None:
            break
        model = wanted
        found.observe(1.0)
    assert model == pytest.approx(0.7) and tried == pytest.approx([0.8, 0.75, 0.725])
    assert found.stopped == "the step fell below 0.025"
    assert found.learning_rate_factor == 1.0  # accuracy was never at fault
    stuck = search(0.6, best=NEVER, compression_rate_step_reduction_factor=1)
    stuck.move()
    assert stuck.unreachable(0.7, 0.6) is None
    assert stuck.stopped == "no higher rate can be reached"


def test_rates_that_come_in_steps():
    """Of a rate that came out higher, the next one starts there; lower ones start at the wish."""
    found = search(0.3, best=NEVER)
    assert found.move() == pytest.approx(0.4)
    found.arrived(0.47)
    found.observe(1.0)
    assert found.move() == pytest.approx(0.57) and found.highest_within == 0.47
    found.arrived(0.7)
    found.observe(0.0)
    assert found.move() == pytest.approx(0.52)


def test_a_search_goes_on_from_its_dictionary():
    def value(rate):
        return 1.0 - 0.3 * rate

    whole = search(0.1, best=NEVER, patience_epochs=1)
    expected = rates(whole, value)
    parted, seen = search(0.1, best=NEVER, patience_epochs=1), []
    while not parted.stopped:
        seen += rates(parted, value, most=1)
        parted = RateSearch(parted.params, parted.goal, **parted.to_dict())
    assert seen == expected and dataclasses.asdict(parted) == dataclasses.asdict(whole)


@pytest.mark.parametrize("limit", np.random.default_rng(0).uniform(0, 1, 20))
def test_the_search_comes_within_a_step_of_the_limit(limit):
    found = search(0.5, best=float(limit >= 0.5), minimal_compression_rate_step=0.001)
    seen = rates(found, lambda rate: float(rate <= limit), most=100)
    reached = max((rate for rate in [0.0, 0.5, *seen] if rate <= limit), default=0.0)
    assert found.stopped
    assert min(limit, 0.95) - reached < 0.002


# The result


def result(rows, **given):
    epochs = tuple(epoch(number, *row) for number, row in enumerate(rows))
    fields = {
        "metric": "val_accuracy",
        "baseline": 1.0,
        "bound": 0.9,
        "rate": 0.5,
        "value": 0.95,
        "reached": True,
        "epoch": 0,
        "stopped": "all epochs are used up",
        "history": {"val_accuracy": [each.value for each in epochs]},
        "lower_is_better": False,
    }
    return AccuracyAwareResult(**fields | given, epochs=epochs)


@pytest.mark.parametrize("lower", [False, True])
def test_the_pareto_set_is_what_no_other_epoch_beats(lower):
    random = np.random.default_rng(0)
    drawn = zip(random.integers(0, 6, 40) / 6, random.integers(0, 6, 40) / 6, strict=True)
    rows = [(float(rate), float(value), True, bool(random.random() > 0.2)) for rate, value in drawn]
    found = result(rows, lower_is_better=lower)

    def beats(a, b):
        sign = -1 if lower else 1
        one, other = (a.rate, sign * a.value), (b.rate, sign * b.value)
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    complete = [each for each in found.epochs if each.complete]
    expected = {(a.rate, a.value) for a in complete if not any(beats(b, a) for b in complete)}
    assert [(e.rate, e.value) for e in found.pareto] == sorted(expected)
    assert found.to_dict()["pareto"] == [each.epoch for each in found.pareto]


def test_the_result_prints_and_becomes_a_dictionary():
    found = result([(0.5, 0.95, True, True), (0.6, 0.5, False, False)])
    text = str(found)
    assert "Epoch 0 is kept: rate 0.5, val_accuracy 0.95, within the bound of 0.9" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "0.5", "0.95", "+0.05", "0", "0.1", "within,", "best"] in lines
    assert ["1", "0.6", "0.5", "-0.4", "0", "0.1", "incomplete"] in lines
    assert found.to_dict()["epochs"][1]["rate"] == 0.6
    missed = result([(None, 0.5, False, True)], rate=None, value=0.5, reached=False)
    assert "Epoch 0 is kept: val_accuracy 0.5, NOT within" in str(missed)
