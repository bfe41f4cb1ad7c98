"""What accuracy-aware training came to, as a result and as a table."""

import dataclasses
import math

from rich import box
from rich.console import Group
from rich.table import Table

from keras_compress.accuracy_aware import Goal
from keras_compress.rendering import Rendered


@dataclasses.dataclass(frozen=True)
class AccuracyAwareResult(Rendered):
    """What `accuracy_aware_fit` came to.

    Attributes:
        metric: name of the logged quantity that counts.
        baseline: its value for the original model.
        bound: the worst value that was allowed.
        rate: that of the model now; None where not exactly one algorithm has a rate.
        value: of the metric for the model now.
        reached: whether that is within the bound.
        epoch: the epoch whose state the model has, counted from 0.
        stopped: why training ended.
        epochs: tuple of `EpochResult`.
        history: {name: list of what was logged in every epoch}.
        lower_is_better: whether small values of the metric are good ones.
    """

    metric: str
    baseline: float
    bound: float
    rate: float | None
    value: float
    reached: bool
    epoch: int
    stopped: str
    epochs: tuple
    history: dict
    lower_is_better: bool

    @property
    def pareto(self):
        """The complete epochs that no other beats in both rate and value, by rising rate."""
        goal = Goal(self.baseline, self.bound, self.lower_is_better)
        front = []
        complete = (each for each in self.epochs if each.complete and not math.isnan(each.value))
        by_rate = sorted(complete, key=lambda e: (-(e.rate or 0), -goal.margin(e.value), e.epoch))
        for each in by_rate:
            if not front or goal.better(each.value, front[-1].value):
                front.append(each)
        return tuple(front[::-1])

    def to_dict(self):
        """Return the result as JSON-able data."""
        return dataclasses.asdict(self) | {
            "epochs": [dataclasses.asdict(each) for each in self.epochs],
            "pareto": [each.epoch for each in self.pareto],
        }

    def renderable(self):
        goal = Goal(self.baseline, self.bound, self.lower_is_better)
        table = epoch_table(self.epochs, goal, self.metric, self.epoch)
        rate = "" if self.rate is None else f"rate {self.rate:.4g}, "
        state = "within the bound" if self.reached else "NOT within the bound"
        return Group(
            table,
            f"Epoch {self.epoch} is kept: {rate}{self.metric} {self.value:.4g}, {state} of "
            f"{self.bound:.4g} (original: {self.baseline:.4g}). Ended as {self.stopped}.",
        )


def epoch_table(epochs, goal, metric, best):
    """Return the table of `EpochResult`s.

    Args:
        epochs: list of them.
        goal: the `Goal`.
        metric: name of the quantity that counts.
        best: number of the epoch that is marked.
    """
    columns = ("epoch", "rate", metric, "budget left", "loss", "learning rate", "")
    table = Table(*columns, title=f"bound: {goal.bound:.4g}", title_justify="left", box=box.SIMPLE)
    for each in epochs:
        marks = {
            "incomplete": not each.complete,
            "within": each.within,
            "best": each.epoch == best,
        }
        table.add_row(
            str(each.epoch),
            "" if each.rate is None else f"{each.rate:.4g}",
            f"{each.value:.4g}",
            f"{goal.margin(each.value):+.4g}",
            f"{each.loss:.4g}",
            f"{each.learning_rate:.3g}",
            ", ".join(mark for mark, holds in marks.items() if holds),
        )
    return table
