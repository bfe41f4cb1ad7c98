"""The search for widths against brute force."""

import itertools

import numpy as np
import pytest

from keras_compress.bit_search import Budget, Infeasible, Link, choose, pareto


def problem(seed, items=5, options=3):
    random = np.random.default_rng(seed)
    losses = [
        np.sort(random.exponential(size=options))[::-1] * 10 ** random.uniform(-4, 4)
        for _ in range(items)
    ]
    costs = [np.sort(random.integers(1, 1000, options)) for _ in range(items)]
    return losses, costs


def total(values, chosen):
    return sum(each[index] for each, index in zip(values, chosen, strict=True))


def brute_force(losses, budgets, allowed=lambda chosen: True):
    every = itertools.product(*(range(len(each)) for each in losses))
    fitting = [
        chosen
        for chosen in every
        if allowed(chosen) and all(total(b.costs, chosen) <= b.limit for b in budgets)
    ]
    return min(total(losses, chosen) for chosen in fitting)


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_brute_force(seed):
    losses, costs = problem(seed)
    least, most = (sum(f(each) for each in costs) for f in (np.min, np.max))
    limit = least + (most - least) * (seed + 1) / 14
    budgets = [Budget("bytes", costs, limit)]
    chosen = choose(losses, budgets)
    assert total(costs, chosen) <= limit
    assert total(losses, chosen) == pytest.approx(brute_force(losses, budgets), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_hold_together(seed):
    losses, costs = problem(seed)
    _, others = problem(seed + 100)
    budgets = [
        Budget(name, each, np.mean([sum(f(c) for c in each) for f in (np.min, np.max)]))
        for name, each in (("bytes", costs), ("time", others))
    ]
    chosen = choose(losses, budgets)
    assert all(budget.total(chosen) <= budget.limit for budget in budgets)
    assert total(losses, chosen) == pytest.approx(brute_force(losses, budgets), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_linked_items_share_a_label(seed):
    """Options are pairs; the second parts of items 0, 2 and of items 1, 3, 4 agree."""
    pairs = [(2, 2), (2, 4), (4, 4)]
    losses, costs = problem(seed)
    labels = np.array([second for _, second in pairs])
    links = [Link(list(items), [labels] * len(items)) for items in ((0, 2), (1, 3, 4))]
    budgets = [Budget("bytes", costs, 0.6 * sum(each.max() for each in costs))]

    def agree(chosen):
        return all(len({labels[chosen[item]] for item in link.items}) == 1 for link in links)

    chosen = choose(losses, budgets, links)
    assert agree(chosen)
    expected = brute_force(losses, budgets, agree)
    assert total(losses, chosen) == pytest.approx(expected, rel=1e-12)


def test_a_budget_is_met_to_the_last_byte():
    losses = [np.array([1.0, 0.0])] * 40
    costs = [np.array([10_000_019, 20_000_003])] * 40
    limit = 40 * 10_000_019 + 7 * (20_000_003 - 10_000_019)
    for short, more in ((0, 7), (1, 6)):
        chosen = choose(losses, [Budget("bytes", costs, limit - short)])
        assert sum(chosen) == more


def test_small_losses_count_beside_large_ones():
    losses = [np.array([1e6, 0.0]), np.array([2e-5, 0.0]), np.array([1e-5, 0.0])]
    chosen = choose(losses, [Budget("bytes", [np.array([1, 2])] * 3, 5)])
    assert chosen == [1, 1, 0]


def test_without_budgets_the_least_loss_is_taken():
    losses, _ = problem(0)
    assert choose(losses) == [2] * 5
    assert choose([np.zeros(2)] * 3, [Budget("bytes", [np.array([1, 2])] * 3, 3)]) == [0, 0, 0]


def test_an_impossible_budget_says_the_least():
    losses, costs = problem(0)
    least = sum(each.min() for each in costs)
    with pytest.raises(Infeasible, match=rf"bytes: {least - 1:,} \(at least {least:,}\)"):
        choose(losses, [Budget("bytes", costs, least - 1)])


def test_the_front_is_that_of_brute_force():
    losses, costs = problem(3, items=4)
    every = list(itertools.product(range(3), repeat=4))
    for cost, loss, chosen in pareto(losses, costs):
        assert (cost, loss) == (total(costs, chosen), pytest.approx(total(losses, chosen)))
        cheaper = [total(losses, each) for each in every if total(costs, each) <= cost]
        assert loss == pytest.approx(min(cheaper), rel=1e-9)
    front = pareto(losses, costs)
    assert len(front) > 4 and front[0][0] == sum(each.min() for each in costs)
    assert [each[0] for each in front] == sorted(each[0] for each in front)
    assert front[-1][1] == pytest.approx(sum(each.min() for each in losses))
