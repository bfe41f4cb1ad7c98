"""The search for widths: one option per item, of least loss, within budgets.

An integer linear program, solved by HiGHS through SciPy. With `x[i, o]` 1 where item i takes
option o, and 0 elsewhere:

    minimize   sum x[i, o] * loss[i, o]
    such that  sum_o x[i, o] = 1                        for every item
               sum x[i, o] * cost[i, o] <= limit        for every budget
               items that are linked take options of one label
"""

from typing import NamedTuple

import numpy as np

SCALE = 1e6  # of the largest loss: the solver's gap of 1e-6 is absolute


class Budget(NamedTuple):
    """A limit on a sum over the items.

    Attributes:
        name: what is limited, for messages.
        costs: list of arrays, one per item, with the cost of each of its options.
        limit: what the sum may not exceed.
    """

    name: str
    costs: list
    limit: float

    def total(self, chosen):
        """Return the sum for options chosen, one index per item."""
        return float(sum(costs[index] for costs, index in zip(self.costs, chosen, strict=True)))

    @property
    def least(self):
        """The smallest sum that there is, links aside."""
        return float(sum(np.min(costs) for costs in self.costs))


class Link(NamedTuple):
    """Items whose options must have one label.

    Attributes:
        items: indices of the items.
        labels: list of arrays, one per such item, with the label of each of its options.
    """

    items: list
    labels: list


class Infeasible(ValueError):
    """No choice is within all budgets."""


def choose(losses, budgets=(), links=()):
    """Return the option of every item: those of least total loss within all budgets.

    Args:
        losses: list of arrays, one per item, with the loss of each of its options.
        budgets: `Budget`s.
        links: `Link`s.

    Returns:
        List with the index of one option per item.

    Raises:
        Infeasible: there is no such choice.

    Example:

    >>> losses = [np.array([9.0, 1.0, 0.0]), np.array([4.0, 2.0, 0.0])]
    >>> bits = [np.array([2, 4, 8])] * 2
    >>> choose(losses, [Budget("bits", bits, 12)])
    [1, 2]
    """
    budgets = list(budgets)
    # The solver allows a limit to be exceeded by a hair: then a little less is asked for.
    for slack in (0.0, 1e-9, 1e-6, 1e-4):
        chosen = _solve(losses, budgets, links, slack)
        if all(budget.total(chosen) <= budget.limit for budget in budgets):
            return chosen
    raise Infeasible("Expected budgets that the solver can meet. " + _described(budgets))


def _solve(losses, budgets, links, slack):
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *(len(each) for each in losses)])
    rows, lower, upper = [], [], []

    def require(columns, values, low, high):
        rows.append((columns, values))
        lower.append(low)
        upper.append(high)

    for first, last in zip(starts[:-1], starts[1:], strict=True):
        require(np.arange(first, last), np.ones(last - first), 1, 1)
    for budget in budgets:
        scale = max(abs(budget.limit), 1e-300)
        costs = np.concatenate([np.asarray(each, "float64") for each in budget.costs])
        require(np.arange(starts[-1]), costs / scale, -np.inf, budget.limit / scale - slack)
    for columns, values in _linked(links, starts):
        require(columns, values, 0, 0)
    cost = np.concatenate([np.asarray(each, "float64") for each in losses])
    largest = np.abs(cost).max()
    matrix = csr_array(
        (
            np.concatenate([values for _, values in rows]),
            np.concatenate([columns for columns, _ in rows]),
            np.cumsum([0, *(len(columns) for columns, _ in rows)]),
        ),
        shape=(len(rows), starts[-1]),
    )
    found = milp(
        cost * (SCALE / largest if largest else 1.0),
        constraints=LinearConstraint(matrix, lower, upper),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise Infeasible(f"{found.message} {_described(budgets)}")
    parts = zip(starts[:-1], starts[1:], strict=True)
    return [int(np.argmax(found.x[first:last])) for first, last in parts]


def _linked(links, starts):
    """Yield (columns, values) of sums that must be 0: a label counts in all items, or in none."""
    for items, labels in links:
        for label in sorted({value for each in labels for value in each.tolist()}):
            first = starts[items[0]] + np.flatnonzero(labels[0] == label)
            for item, own in zip(items[1:], labels[1:], strict=True):
                other = starts[item] + np.flatnonzero(own == label)
                values = np.concatenate([np.ones(len(first)), -np.ones(len(other))])
                yield np.concatenate([first, other]), values


def _described(budgets):
    texts = (f"{each.name}: {each.limit:,.6g} (at least {each.least:,.6g})" for each in budgets)
    return "; ".join(texts)


def pareto(losses, costs, links=(), points=24):
    """Return the choices that no other beats in both loss and cost, by rising cost.

    Args:
        losses: as for `choose`.
        costs: list of arrays, one per item, with the cost of each of its options.
        links: as for `choose`.
        points: how many budgets are tried, evenly spaced from the least cost to the largest.

    Returns:
        List of `(cost, loss, chosen)`.

    Example:

    >>> losses = [np.array([3.0, 0.0]), np.array([5.0, 1.0])]
    >>> [front[:2] for front in pareto(losses, [np.array([1, 2])] * 2)]
    [(2.0, 8.0), (3.0, 4.0), (4.0, 1.0)]
    """
    least = Budget("cost", costs, 0).least
    most = float(sum(np.max(each) for each in costs))
    front = []
    for limit in np.linspace(least, most, points):
        try:
            chosen = choose(losses, [Budget("cost", costs, limit)], links)
        except Infeasible:  # links leave less than the least cost of each item on its own
            continue
        cost = Budget("cost", costs, limit).total(chosen)
        loss = float(sum(each[index] for each, index in zip(losses, chosen, strict=True)))
        if not front or loss < front[-1][1]:
            front.append((cost, loss, chosen))
    return front
