"""Schedules: from a training step to a value.

A schedule is a callable `step -> value`. Its values are whatever the argument means that it is given to: an amount where an
amount is asked for (`sparsity`, `ratio`), and progress from 0 to 1, the share of the whole change, where `at` asks for a time.

Steps are optimizer steps. Where a schedule takes a step it takes an `int` (that step) or a `float` in 0..1 (that fraction of
training); a schedule with fractions is bound to the length of training first:

>>> ramp = Cubic(final=0.5, end=0.5, every=10).bind(total_steps=200)
>>> [round(ramp(step), 3) for step in (0, 9, 20, 50, 100, 199)]
[0.0, 0.0, 0.244, 0.438, 0.5, 0.5]
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from typing_extensions import Self

from billhook.arguments import check_int, check_number

Step = int | float
"""An optimizer step (`int`), or a fraction of training (`float` in 0..1)."""


def resolve_step(step: Step, total_steps: int, name: str = "step") -> int:
    """Returns the optimizer step that `step` means in a training of `total_steps` steps.

    Raises:
        ValueError: If the step is negative, past the end of training, or a fraction outside 0..1.

    >>> resolve_step(30, 200), resolve_step(0.25, 200)
    (30, 50)
    """
    check_step(step, name)
    if isinstance(step, float):
        return round(step * total_steps)
    if step > total_steps:
        raise ValueError(f"{name}={step} is past the end of training, which has {total_steps} optimizer steps")
    return step


def check_step(step: Step, name: str = "step") -> None:
    """Refuses values that are neither a step nor a fraction of training."""
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise ValueError(f"{name} must be an int (a step) or a float in 0..1 (a fraction of training), got {step!r}")
    if isinstance(step, float) and not 0.0 <= step <= 1.0:
        raise ValueError(f"{name}={step} as a float is a fraction of training and must be in 0..1; for a step give an int")
    if step < 0:
        raise ValueError(f"{name}={step} is negative: the first optimizer step is 0")


class Schedule(ABC):
    """A value that depends on the training step: an amount, or with `at` the progress from 0 to 1."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""

    @abstractmethod
    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with every fraction of training turned into a step.

        Raises:
            ValueError: If a step lies past the end of training.
        """

    def changes(self, total_steps: int) -> Iterator[int]:
        """Yields the steps in 0..total_steps at which the value differs from the step before (and 0 if it starts above zero).

        >>> list(Linear(final=1.0, start=10, end=30, every=10).changes(100))
        [20, 30]
        """
        bound, last = self.bind(total_steps), 0.0
        for step in range(total_steps + 1):
            if (value := bound(step)) != last:
                yield step
            last = value


@dataclass(frozen=True)
class Constant(Schedule):
    """One value from a step on, `initial` before it.

    Args:
        value: The value.
        start: First step with the value, as a step or a fraction of training.
        initial: The value before `start`.

    >>> Constant(0.5, start=3)(2), Constant(0.5, start=3)(3)
    (0.0, 0.5)
    """

    value: float
    start: Step = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""
        return self.value if step >= _bound(self.start, "start") else self.initial

    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with fractions of training turned into steps."""
        return replace(self, start=resolve_step(self.start, total_steps, "start"))


@dataclass(frozen=True)
class Ramp(Schedule):
    """From `initial` at `start` to `final` at `end`; subclasses give the shape between.

    Args:
        final: The value from `end` on.
        initial: The value up to `start`.
        start: Where the ramp starts, as a step or a fraction of training.
        end: Where the ramp ends, as a step or a fraction of training.
        every: The value moves only at every so many steps after `start` (and reaches `final` at `end` in any case).

    Raises:
        ValueError: If `every` is below 1, or the ramp ends before it starts.
    """

    final: float
    initial: float = 0.0
    start: Step = 0
    end: Step = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_int("every", self.every)
        if type(self.start) is type(self.end) and self.end < self.start:
            raise ValueError(f"end={self.end} comes before start={self.start}")

    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""
        start, end = _bound(self.start, "start"), _bound(self.end, "end")
        if step >= end:
            return self.final
        if step < start + self.every:
            return self.initial
        return self.at((step - start) // self.every * self.every / (end - start))

    def at(self, progress: float) -> float:
        """Returns the value at a share `progress` (0..1) of the ramp."""
        return self.initial + (self.final - self.initial) * progress

    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with fractions of training turned into steps."""
        start, end = resolve_step(self.start, total_steps, "start"), resolve_step(self.end, total_steps, "end")
        return replace(self, start=start, end=end)


@dataclass(frozen=True)
class Linear(Ramp):
    """A straight line: initial + (final - initial) t, where t runs from 0 at `start` to 1 at `end`.

    >>> Linear(final=0.8, end=100)(50)
    0.4
    """


@dataclass(frozen=True)
class Cubic(Ramp):
    """Fast at first, then slower: final + (initial - final) (1 - t)^3.

    Equation 1 of "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", Zhu & Gupta, 2017,
    https://arxiv.org/abs/1710.01878.

    >>> round(Cubic(final=0.8, end=100)(50), 3)
    0.7
    """

    def at(self, progress: float) -> float:
        """Returns the value at a share `progress` (0..1) of the ramp."""
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Cosine(Ramp):
    """Slow at both ends: initial + (final - initial) (1 - cos(pi t)) / 2.

    >>> round(Cosine(final=0.8, end=100)(25), 3)
    0.117
    """

    def at(self, progress: float) -> float:
        """Returns the value at a share `progress` (0..1) of the ramp."""
        return self.initial + (self.final - self.initial) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    """An equal fraction of the rest at each step: 1 - (1 - initial)^(1-t) (1 - final)^t.

    Values are fractions removed, so the rest, 1 - value, falls geometrically, as in pruning by rounds.

    Raises:
        ValueError: If `initial` or `final` is not below 1.

    >>> round(Exponential(final=0.75, end=2)(1), 3)
    0.5
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initial", "final"):
            if (value := getattr(self, name)) >= 1:
                raise ValueError(f"{name}={value} must be below 1: it is the fraction removed, and some must be left")

    def at(self, progress: float) -> float:
        """Returns the value at a share `progress` (0..1) of the ramp."""
        left: float = (1 - self.initial) ** (1 - progress) * (1 - self.final) ** progress
        return 1 - left


@dataclass(frozen=True)
class MultiStep(Schedule):
    """A staircase: each value holds from its step to the next one's.

    Args:
        values: The values, one per step.
        steps: Where each value starts, as steps or fractions of training, in ascending order.
        initial: The value before the first step.

    Raises:
        ValueError: If there is not one step per value, a value is not finite, or the steps do not ascend.

    >>> stairs = MultiStep(values=[0.3, 0.6], steps=[10, 20])
    >>> stairs(9), stairs(10), stairs(25)
    (0.0, 0.3, 0.6)
    """

    values: list[float]
    steps: list[Step]
    initial: float = 0.0

    def __post_init__(self) -> None:
        if len(self.values) != len(self.steps) or not self.values:
            raise ValueError(
                f"values and steps must have the same length of at least 1, got {len(self.values)} and {len(self.steps)}"
            )
        for step, value in zip(self.steps, self.values, strict=True):
            check_step(step, "steps")
            check_number("values", value)
        check_number("initial", self.initial)
        # equal steps are what fractions become in a training that is very short: the last one holds
        if len({type(s) for s in self.steps}) == 1 and any(b < a for a, b in pairwise(self.steps)):
            raise ValueError(f"steps={self.steps} must ascend")

    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""
        passed = [v for v, s in zip(self.values, self.steps, strict=True) if step >= _bound(s, "steps")]
        return passed[-1] if passed else self.initial

    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with fractions of training turned into steps."""
        return replace(self, steps=[resolve_step(s, total_steps, "steps") for s in self.steps])


def _check(schedule: Constant | Ramp) -> None:
    for field in fields(schedule):
        if field.name in ("start", "end"):
            check_step(getattr(schedule, field.name), field.name)
        else:
            check_number(field.name, getattr(schedule, field.name))


def _bound(step: Step, name: str) -> int:
    if isinstance(step, float):
        raise ValueError(f"{name}={step} is a fraction of training: call bind(total_steps) first")
    return step
