"""Sparsity schedules: the fraction of weights at zero in an epoch.

Pure Python. A schedule is a frozen value; all its arguments are keywords. Three kinds are called
with an epoch, `schedule(epoch)`. `Adaptive` follows the sparsity that training reaches instead.
"""

import math
import numbers
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from keras_compress.schedules import check_level, check_levels, checked_epoch, exponential_level

SPARSITY_SCHEDULES = {}  # configuration name -> class, filled by subclassing
ADAPTIVE_STEP = 0.05  # how far the level of `Adaptive` moves at a time
ADAPTIVE_SLACK = 0.03  # how far below the level a sparsity counts as reached


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """Base of the sparsity schedules: it knows when masks no longer change.

    Args:
        freeze_epoch: number of at least 0, the epoch from which masks stay as they are; infinite
            where they never freeze. It does not stop the level: frozen before the target is
            reached, masks never come to it.

    Raises:
        ValueError: an argument is outside its bounds.
    """

    freeze_epoch: float = math.inf

    def __init_subclass__(cls, name=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            SPARSITY_SCHEDULES[name] = cls

    def __post_init__(self):
        _check_number("freeze_epoch", self.freeze_epoch, infinite=True)

    def frozen(self, epoch):
        """Return whether the masks no longer change: `epoch >= freeze_epoch`."""
        return checked_epoch(epoch) >= self.freeze_epoch


@dataclass(frozen=True, kw_only=True)
class SparsityRamp(SparsitySchedule):
    """Base of the schedules that run from one level to another: `schedule(epoch)` is the level.

    A subclass gives `curve`, the course of the level inside the ramp. The base does the rest:

        level(epoch) = clip(curve(epoch / target_epoch), init, target)  before target_epoch
                       target                                           from there on

    An epoch is a number of at least 0. Fractions are taken as they are: a level that moves with
    every optimizer step is `schedule(epoch + step / steps_per_epoch)`, with the step in the epoch.

    Invariants: `init <= schedule(epoch) <= target`, exactly. Levels never fall, up to the last
    digit of a float.

    Args:
        init: level in [0, target] in epoch 0.
        target: level in [0, 1) at the end of the ramp.
        target_epoch: finite number of at least 0; 0 is at the target at once.
        freeze_epoch: as for `SparsitySchedule`.
    """

    init: float
    target: float
    target_epoch: float

    def __post_init__(self):
        super().__post_init__()
        check_levels(self.init, self.target)
        _check_number("target_epoch", self.target_epoch)

    def __call__(self, epoch):
        if checked_epoch(epoch) >= self.target_epoch:
            return float(self.target)
        level = self.curve(epoch / self.target_epoch)
        return float(min(max(level, self.init), self.target))


@dataclass(frozen=True, kw_only=True)
class Polynomial(SparsityRamp, name="polynomial"):
    """The level moves as a power of the time that is gone, or left.

    Formula, with `share = epoch / target_epoch`:

        level = target - (target - init) * (1 - share) ** power        concave
        level = init + (target - init) * share ** power                convex

    Concave with a power above 1 is fast first, then slow; a power below 1 turns that around, and
    1 is a straight line either way. A power of 0 is one jump: at the end of the ramp where
    concave, else at once. Concave with power 3 is the schedule of Zhu and Gupta.

    Args:
        init: level in [0, target] in epoch 0.
        target: level in [0, 1) from `target_epoch` on.
        target_epoch: finite number of at least 0.
        power: finite number of at least 0.
        concave: whether the power is taken of the time left.
        freeze_epoch: as for `SparsitySchedule`.

    Example:

    >>> schedule = Polynomial(init=0.0, target=0.5, target_epoch=2, power=3, freeze_epoch=3)
    >>> [schedule(epoch) for epoch in (0, 0.5, 1, 2, 3)]
    [0.0, 0.2890625, 0.4375, 0.5, 0.5]
    >>> [schedule.frozen(epoch) for epoch in range(5)]
    [False, False, False, True, True]

    Reference: Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for
    model compression, arXiv:1710.01878, equation 1.
    """

    power: float = 0.9
    concave: bool = True

    def __post_init__(self):
        super().__post_init__()
        _check_number("power", self.power)

    def curve(self, share):
        """Return the level at a share in [0, 1) of the ramp."""
        if self.concave:
            return self.target - (self.target - self.init) * (1 - share) ** self.power
        return self.init + (self.target - self.init) * share**self.power


@dataclass(frozen=True, kw_only=True)
class Exponential(SparsityRamp, name="exponential"):
    """The share of weights that stay shrinks by the same factor in every epoch of the ramp.

    Formula, with `share = epoch / target_epoch`:

        level = 1 - (1 - init) * ((1 - target) / (1 - init)) ** share

    Args:
        init: level in [0, target] in epoch 0.
        target: level in [0, 1) from `target_epoch` on.
        target_epoch: finite number of at least 0.
        freeze_epoch: as for `SparsitySchedule`.

    Example:

    >>> schedule = Exponential(init=0.0, target=0.75, target_epoch=2)
    >>> [schedule(epoch) for epoch in range(4)]
    [0.0, 0.5, 0.75, 0.75]
    """

    def curve(self, share):
        """Return the level at a share in [0, 1) of the ramp."""
        return exponential_level(self.init, self.target, share)


@dataclass(frozen=True, kw_only=True)
class Multistep(SparsitySchedule, name="multistep"):
    """The level changes in given epochs, and in between stays.

    Formula, with the steps in ascending order:

        level(epoch) = levels[number of steps that are not above epoch]

    Args:
        steps: numbers of at least 0, in any order: the epochs that change the level.
        levels: levels in [0, 1), one more than steps: that before the first of them, and that
            from each on. They may fall.
        freeze_epoch: as for `SparsitySchedule`.

    Example:

    >>> schedule = Multistep(steps=(2, 3), levels=(0.1, 0.5, 0.6))
    >>> [schedule(epoch) for epoch in range(5)]
    [0.1, 0.1, 0.5, 0.6, 0.6]
    >>> schedule.target, schedule.target_epoch
    (0.6, 3)
    """

    steps: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        for step in self.steps:
            _check_number("step", step)
        for level in self.levels:
            check_level("level", level)
        if len(self.levels) != len(self.steps) + 1:
            raise ValueError(
                "Expected one more level than steps. Received: "
                f"steps={self.steps!r}, levels={self.levels!r}"
            )
        object.__setattr__(self, "steps", tuple(sorted(self.steps)))
        object.__setattr__(self, "levels", tuple(self.levels))

    @property
    def target(self):
        """The last level."""
        return self.levels[-1]

    @property
    def target_epoch(self):
        """First epoch at the target: the last of the steps; 0 where there is none."""
        return self.steps[-1] if self.steps else 0

    def __call__(self, epoch):
        return float(self.levels[bisect_right(self.steps, checked_epoch(epoch))])


class AdaptiveState(NamedTuple):
    """What `Adaptive` remembers from epoch to epoch.

    Args:
        level: the level of this epoch.
        bad_epochs: epochs that reached the level since it was last raised.
    """

    level: float
    bad_epochs: int


@dataclass(frozen=True, kw_only=True)
class Adaptive(SparsitySchedule, name="adaptive"):
    """The level rises when the sparsity that training reaches has caught up with it.

    For algorithms whose sparsity lags behind the level, such as those that learn their masks. It
    is no function of the epoch: the first epoch has the level of `start`; before every later one,
    `state = schedule.next(state, reached)`, and the level is `state.level`.

    Formula, `reached` being the sparsity after the epoch:

        bad += 1                                             if reached >= level - 0.03
        level = min(level + 0.05, target) and bad = 0        if then bad >= patience

    `bad` does not go back to 0 in an epoch that falls short. A patience of 0 raises the level in
    every epoch, whatever is reached; 1 in every epoch that reaches it.

    Args:
        init: level in [0, target] to start with.
        target: level in [0, 1), never exceeded.
        patience: whole number of at least 0, the epochs that must reach a level.
        freeze_epoch: as for `SparsitySchedule`.

    Example:

    >>> schedule = Adaptive(init=0.1, target=0.18, patience=1)
    >>> state = schedule.start
    >>> for reached in (0.06, 0.07, 0.15, 0.15):
    ...     state = schedule.next(state, reached)
    ...     print(state.level)
    0.1
    0.15
    0.18
    0.18
    """

    init: float
    target: float
    patience: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_levels(self.init, self.target)
        if not isinstance(self.patience, numbers.Integral) or self.patience < 0:
            raise ValueError(
                f"Expected a whole number of at least 0. Received: patience={self.patience!r}"
            )

    @property
    def start(self):
        """The state of the first epoch."""
        return AdaptiveState(float(self.init), 0)

    def next(self, state, reached):
        """Return the state of the next epoch.

        Args:
            state: the `AdaptiveState` of the epoch that ends.
            reached: sparsity in [0, 1] at its end.
        """
        if not 0 <= reached <= 1:
            raise ValueError(f"Expected a sparsity in [0, 1]. Received: reached={reached!r}")
        level, bad_epochs = state
        # Rounded, steps of 0.05 add up to the decimal numbers that they stand for.
        bad_epochs += bool(reached >= round(level - ADAPTIVE_SLACK, 12))
        if bad_epochs < self.patience:
            return AdaptiveState(level, bad_epochs)
        return AdaptiveState(float(min(round(level + ADAPTIVE_STEP, 12), self.target)), 0)


def _check_number(name, value, infinite=False):
    bounded = isinstance(value, numbers.Real) and value >= 0
    if not bounded or (value == math.inf and not infinite):
        kind = "a number" if infinite else "a finite number"
        raise ValueError(f"Expected {kind} of at least 0. Received: {name}={value!r}")
