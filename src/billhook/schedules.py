"""Schedules: values as a function of the training step.

A schedule is a callable `step -> value`. The value is an amount for arguments such as `sparsity` and `ratio`, and progress from 0
to 1 for `at`.

Steps are optimizer steps: an `int` is a step, a `float` in 0..1 is a fraction of training. A schedule with fractions must be
bound to the length of training first:

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

Step = int | float  # an optimizer step (`int`), or a fraction of training (`float` in 0..1)


def resolve_step(step: Step, total_steps: int, name: str = "step") -> int:
    """Returns the optimizer step for a step or a fraction of training.

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
    """Raises unless a value is a step or a fraction of training."""
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise ValueError(f"{name}={step!r} must be an int (a step) or a float in 0..1 (a fraction of training)")
    if isinstance(step, float) and not 0.0 <= step <= 1.0:
        raise ValueError(f"{name}={step} as a float is a fraction of training and must be in 0..1. Pass an int for a step.")
    if step < 0:
        raise ValueError(f"{name}={step} is negative: the first optimizer step is 0")


class Schedule(ABC):
    """A value that depends on the training step: an amount, or progress from 0 to 1."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""

    @abstractmethod
    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with every fraction of training resolved to a step.

        Raises:
            ValueError: If a step lies past the end of training.
        """

    def changes(self, total_steps: int) -> Iterator[int]:
        """Yields the steps in 0..total_steps at which the value changes.

        Yields 0 if the value at step 0 is not zero.

        >>> list(Linear(final=1.0, start=10, end=30, every=10).changes(100))
        [20, 30]
        """
        bound, previous = self.bind(total_steps), 0.0
        for step in range(total_steps + 1):
            if (value := bound(step)) != previous:
                yield step
            previous = value


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant value from a step on, and `initial` before it.

    Args:
        value: Value from `start` on.
        start: First step with the value: a step (int) or a fraction of training (float).
        initial: Value before `start`.

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
        """Returns the same schedule with fractions of training resolved to steps."""
        return replace(self, start=resolve_step(self.start, total_steps, "start"))


@dataclass(frozen=True)
class Ramp(Schedule):
    """A ramp from `initial` at `start` to `final` at `end`; subclasses define its shape.

    Args:
        final: Value from `end` on.
        initial: Value up to `start`.
        start: Start of the ramp: a step (int) or a fraction of training (float).
        end: End of the ramp: a step (int) or a fraction of training (float).
        every: Interval in steps, from `start` on, at which the value changes. It reaches `final` at `end` in any case.

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
            raise ValueError(f"end={self.end} must not be before start={self.start}")

    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""
        start, end = _bound(self.start, "start"), _bound(self.end, "end")
        if step >= end:
            return self.final
        if step < start + self.every:
            return self.initial
        return self.at((step - start) // self.every * self.every / (end - start))

    def at(self, progress: float) -> float:
        """Returns the value at a fraction `progress` (0..1) of the ramp."""
        return self.initial + (self.final - self.initial) * progress

    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with fractions of training resolved to steps."""
        start, end = resolve_step(self.start, total_steps, "start"), resolve_step(self.end, total_steps, "end")
        return replace(self, start=start, end=end)


@dataclass(frozen=True)
class Linear(Ramp):
    """A linear ramp: initial + (final - initial) t, with t from 0 at `start` to 1 at `end`.

    >>> Linear(final=0.8, end=100)(50)
    0.4
    """


@dataclass(frozen=True)
class Cubic(Ramp):
    """A cubic ramp, fast at first: final + (initial - final) (1 - t)^3.

    Reference: equation 1 of "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression" (Zhu & Gupta,
    2017), https://arxiv.org/abs/1710.01878.

    >>> round(Cubic(final=0.8, end=100)(50), 3)
    0.7
    """

    def at(self, progress: float) -> float:
        """Returns the value at a fraction `progress` (0..1) of the ramp."""
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Cosine(Ramp):
    """A cosine ramp, slow at both ends: initial + (final - initial) (1 - cos(pi t)) / 2.

    >>> round(Cosine(final=0.8, end=100)(25), 3)
    0.117
    """

    def at(self, progress: float) -> float:
        """Returns the value at a fraction `progress` (0..1) of the ramp."""
        return self.initial + (self.final - self.initial) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    """A geometric ramp: 1 - (1 - initial)^(1-t) (1 - final)^t.

    Values are fractions removed, so the remaining fraction, 1 - value, falls geometrically, as in iterative pruning.

    Raises:
        ValueError: If `initial` or `final` is not below 1.

    >>> round(Exponential(final=0.75, end=2)(1), 3)
    0.5
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initial", "final"):
            if (value := getattr(self, name)) >= 1:
                raise ValueError(f"{name}={value} must be below 1, because it is the fraction to remove")

    def at(self, progress: float) -> float:
        """Returns the value at a fraction `progress` (0..1) of the ramp."""
        left: float = (1 - self.initial) ** (1 - progress) * (1 - self.final) ** progress
        return 1 - left


@dataclass(frozen=True)
class MultiStep(Schedule):
    """A staircase: each value applies from its step to the next.

    Args:
        values: Values, one per step.
        steps: Start of each value, ascending: steps (int) or fractions of training (float).
        initial: Value before the first step.

    Raises:
        ValueError: If `values` and `steps` differ in length, a value is not finite, or the steps do not ascend.

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
                f"values and steps must have the same length, at least 1, got {len(self.values)} and {len(self.steps)}"
            )
        for step, value in zip(self.steps, self.values, strict=True):
            check_step(step, "steps")
            check_number("values", value)
        check_number("initial", self.initial)
        # fractions may resolve to equal steps in a very short training; the last value applies
        if len({type(s) for s in self.steps}) == 1 and any(b < a for a, b in pairwise(self.steps)):
            raise ValueError(f"steps={self.steps} must ascend")

    def __call__(self, step: int) -> float:
        """Returns the value at an optimizer step."""
        passed = [v for v, s in zip(self.values, self.steps, strict=True) if step >= _bound(s, "steps")]
        return passed[-1] if passed else self.initial

    def bind(self, total_steps: int) -> Self:
        """Returns the same schedule with fractions of training resolved to steps."""
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
