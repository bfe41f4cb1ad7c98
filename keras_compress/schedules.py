"""Schedules: the pruning level of an epoch.

Pure Python. A schedule is a frozen value that is called with an epoch; it remembers nothing.
"""

import math
import numbers
from dataclasses import dataclass
from functools import cached_property

SCHEDULES = {}  # configuration name -> class, filled by subclassing


@dataclass(frozen=True)
class Schedule:
    """Base of the schedules: `schedule(epoch)` is the level, a float in [0, 1).

    A subclass gives `curve`, the course of the level inside the ramp. The base does the rest:

        level(epoch) = 0                                 before num_init_steps
                       clip(curve(share), init, target)  in the ramp
                       target                            from target_epoch on

    with `share = (epoch - num_init_steps) / (pruning_steps - 1)` in [0, 1). An epoch is a number
    of at least 0; fractions are taken as they are. Before the ramp the level is 0, not `init`. A
    ramp of one epoch is at the target at once.

    Invariants: `schedule(epoch) <= target`, exactly. Levels never fall, up to the last digit of a
    float.

    Args:
        init: level in [0, target] at the start of the ramp.
        target: level in [0, 1) at its end.
        num_init_steps: whole number of epochs before pruning begins.
        pruning_steps: whole number of epochs of the ramp, at least 1.

    Raises:
        ValueError: an argument is outside its bounds.
    """

    init: float
    target: float
    num_init_steps: int
    pruning_steps: int

    def __init_subclass__(cls, name=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            SCHEDULES[name] = cls

    def __post_init__(self):
        check_levels(self.init, self.target)
        for name, smallest in (("num_init_steps", 0), ("pruning_steps", 1)):
            steps = getattr(self, name)
            if not isinstance(steps, numbers.Integral) or steps < smallest:
                raise ValueError(
                    f"Expected a whole number of at least {smallest}. Received: {name}={steps!r}"
                )

    @property
    def target_epoch(self):
        """First epoch at the target: the last of the ramp, `num_init_steps + pruning_steps - 1`."""
        return self.num_init_steps + self.pruning_steps - 1

    def __call__(self, epoch):
        if checked_epoch(epoch) < self.num_init_steps:
            return 0.0
        if epoch >= self.target_epoch:
            return float(self.target)
        level = self.curve((epoch - self.num_init_steps) / (self.pruning_steps - 1))
        return float(min(max(level, self.init), self.target))

    def frozen(self, epoch):
        """Return whether the masks no longer change: `epoch > target_epoch`.

        The masks of the target are set in `target_epoch` itself, and those stay.
        """
        return checked_epoch(epoch) > self.target_epoch


class Baseline(Schedule, name="baseline"):
    """The target at once, in epoch `num_init_steps`.

    Formula:

        level(epoch) = 0 if epoch < num_init_steps else target

    Masks are frozen after epoch `num_init_steps`: from `num_init_steps + 1` on.

    Args:
        init: level in [0, target], without effect here.
        target: level in [0, 1).
        num_init_steps: whole number of epochs before pruning.
        pruning_steps: without effect here.

    Example:

    >>> schedule = Baseline(init=0.0, target=0.5, num_init_steps=2, pruning_steps=4)
    >>> [schedule(epoch) for epoch in range(5)]
    [0.0, 0.0, 0.5, 0.5, 0.5]
    >>> [schedule.frozen(epoch) for epoch in range(5)]
    [False, False, False, True, True]
    """

    @property
    def target_epoch(self):
        """First epoch at the target: `num_init_steps`."""
        return self.num_init_steps


class Exponential(Schedule, name="exponential"):
    """The share of filters that stay shrinks by the same factor in every epoch of the ramp.

    Formula, with `share = (epoch - num_init_steps) / (pruning_steps - 1)`:

        level = 1 - (1 - init) * ((1 - target) / (1 - init)) ** share

    The target is reached in epoch `num_init_steps + pruning_steps - 1`; masks are frozen after it.

    Args:
        init: level in [0, target] at the start of the ramp.
        target: level in [0, 1) at its end.
        num_init_steps: whole number of epochs before pruning begins.
        pruning_steps: whole number of epochs of the ramp, at least 1.

    Example:

    >>> schedule = Exponential(init=0.0, target=0.75, num_init_steps=1, pruning_steps=3)
    >>> [schedule(epoch) for epoch in range(5)]
    [0.0, 0.0, 0.5, 0.75, 0.75]
    >>> [schedule.frozen(epoch) for epoch in range(5)]
    [False, False, False, False, True]
    """

    def curve(self, share):
        """Return the level at a share in [0, 1) of the ramp."""
        return exponential_level(self.init, self.target, share)


class ExponentialWithBias(Schedule, name="exponential_with_bias"):
    """A fast start: three quarters of the target after one eighth of the ramp.

    Formula, with `share = (epoch - num_init_steps) / (pruning_steps - 1)`:

        level = a * exp(-decay * share) + b
        level(0) = init,  level(1/8) = 0.75 * target,  level(1) = target

    A decay that satisfies the three exists if and only if `init < 5/7 * target`. From there to the
    target the level runs straight, `init + (target - init) * share`, which is where the curve
    tends as `init` comes up to 5/7 of the target.

    The target is reached in epoch `num_init_steps + pruning_steps - 1`; masks are frozen after it.

    Args:
        init: level in [0, target] at the start of the ramp.
        target: level in [0, 1) at its end.
        num_init_steps: whole number of epochs before pruning begins.
        pruning_steps: whole number of epochs of the ramp, at least 1.

    Example:

    >>> schedule = ExponentialWithBias(init=0.0, target=0.8, num_init_steps=0, pruning_steps=9)
    >>> [round(schedule(epoch), 4) for epoch in range(5)]
    [0.0, 0.6, 0.75, 0.7875, 0.7969]
    >>> schedule(8)
    0.8
    """

    @cached_property
    def decay(self):
        """Exponent at the end of the ramp, at least 0; 0 where the level runs straight.

        Dividing `y**(1/8) - c*y + c - 1 = 0`, with `y = exp(-decay)` and
        `c = (0.75*target - init) / (target - init)`, by its trivial root `y = 1` leaves

            1 + u + ... + u**7 = 1 / c,    u = y**(1/8)

        whose left side grows from 1 to 8 over u in [0, 1]. Since `1 / c >= 4/3`, the one root lies
        in (0, 1) if and only if `0 < 1 / c < 8`, that is `init < 5/7 * target`.
        """
        if 7 * self.init >= 5 * self.target:
            return 0.0
        ratio = self.init / self.target
        wanted = (1 - ratio) / (0.75 - ratio)
        low, high = 0.0, 1.0
        for _ in range(60):  # halves the interval down to the last digit of a float
            middle = (low + high) / 2
            if sum(middle**power for power in range(8)) < wanted:
                low = middle
            else:
                high = middle
        return -8 * math.log(high)

    def curve(self, share):
        """Return the level at a share in [0, 1) of the ramp."""
        if self.decay > 0:  # the same as a * exp(-decay * share) + b, without cancellation
            share = math.expm1(-self.decay * share) / math.expm1(-self.decay)
        return self.init + (self.target - self.init) * share


def exponential_level(init, target, share):
    """Level at a share of a ramp in which the density, `1 - level`, shrinks by one factor.

    Formula:

        level = 1 - (1 - init) * ((1 - target) / (1 - init)) ** share

    Args:
        init: level in [0, target] at share 0.
        target: level in [0, 1) at share 1.
        share: number in [0, 1].

    Example:

    >>> [exponential_level(0.0, 0.75, share) for share in (0, 0.5, 1)]
    [0.0, 0.5, 0.75]
    """
    return 1 - (1 - init) * ((1 - target) / (1 - init)) ** share


def check_level(name, level):
    """Raise a `ValueError` unless a level lies in [0, 1)."""
    if not 0 <= level < 1:
        raise ValueError(f"Expected a level in [0, 1). Received: {name}={level!r}")


def check_levels(init, target):
    """Raise a `ValueError` unless `0 <= init <= target < 1`."""
    check_level("init", init)
    check_level("target", target)
    if init > target:
        raise ValueError(
            "Expected an initial level that is not above the target. Received: "
            f"init={init!r}, target={target!r}"
        )


def checked_epoch(epoch):
    """Return the epoch; raise a `ValueError` unless it is a number of at least 0."""
    if not epoch >= 0:
        raise ValueError(f"Expected an epoch of at least 0. Received: epoch={epoch!r}")
    return epoch
