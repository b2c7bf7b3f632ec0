"""When something is pruned in a fit, and how much of it.

`ratio=Linear(final=0.5)` is a schedule of the amount; `at=Linear(final=1.0)` one of the share of it that is removed by a step.
"""

import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from billhook.fit.run import is_trial
from billhook.schedules import Schedule, Step, check_step, resolve_step

At = Step | Literal["start"]
"""A step (int), a fraction of training (float in 0..1), or `"start"`."""


def check_at(at: At | Schedule, amount: object = None) -> None:
    """Refuses a moment that is none, or that contradicts a schedule of the amount."""
    if isinstance(at, str) and at != "start":
        raise ValueError(f"at={at!r} must be 'start', an int (a step) or a float in 0..1 (a fraction of training)")
    if not isinstance(at, Schedule | str):
        check_step(at, "at")
    if isinstance(amount, Schedule) and at != "start":
        raise ValueError(f"at={at!r}: the schedule says when; give it start and end instead")


def rounds_of(amount: float | Schedule, at: At | Schedule, total: int | None, trainer: pl.Trainer, name: str) -> dict[int, float]:
    """Finds from which step on how much is pruned; in a `fast_dev_run` there is only the last round.

    Args:
        amount: A fraction, or a schedule of it.
        at: When, or a schedule of the share of the amount.
        total: Steps of training; None where that is not known.
        trainer: The trainer.
        name: The name of the argument that is the amount.
    """
    trial = is_trial(trainer)
    if isinstance(amount, Schedule):
        return _amounts(amount, total, trial, name)
    if isinstance(at, Schedule):
        return {step: share * amount for step, share in shares_of(at, total, trial).items()}
    return {step_of(at, total, trial): amount}


def _values(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    """Returns what a schedule gives from which step on; in a trial, which may be shorter than it, there is only its end."""
    if total is None:
        raise ValueError(f"{name}: a schedule needs the length of training, which is not known: set max_steps")
    bound = schedule.bind(sys.maxsize if trial else total)
    return {total: bound(sys.maxsize)} if trial else {step: bound(step) for step in bound.changes(total)}


def _amounts(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    rounds = _values(schedule, total, trial, name)
    for step, value in rounds.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
    for higher, lower in pairwise(rounds.values()):
        if lower < higher:
            raise ValueError(f"{name}: the schedule goes down, from {higher:g} to {lower:g}: what is pruned does not come back")
    return rounds


def shares_of(schedule: Schedule, total: int | None, trial: bool) -> dict[int, float]:
    """Finds from which step on which share of the amount is pruned; refuses a schedule that does not rise to 1."""
    shares = _values(schedule, total, trial, f"at={schedule}")
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={schedule}: it must rise to 1 at most, and is {value:g} at step {step} after {before:g}")
    if max(shares.values(), default=0) < 1:
        raise ValueError(
            f"at={schedule}: it says which share of the amount is pruned, and must rise to 1 before training ends; how much is "
            "pruned in all is said by the amount"
        )
    return shares


def step_of(at: At, total: int | None, trial: bool = False, name: str = "at") -> int:
    """Returns the step of a moment, 0 for the start; in a trial, which may be shorter, the last step at most."""
    if at == "start":
        return 0
    if total is None and isinstance(at, float):
        raise ValueError(f"{name}={at} is a fraction of training, whose length is not known: set max_steps")
    moment = min(at, total or 0) if trial and isinstance(at, int) else at
    return resolve_step(moment, sys.maxsize if total is None else total, name)


def still_due(rounds: Mapping[int, float], done: int, asked: float, name: str) -> dict[int, float]:
    """Drops rounds that would un-prune what was `asked` by step `done`, in a resumed fit of another schedule or length."""
    before = max((amount for step, amount in rounds.items() if step <= done), default=0.0)
    if done < 0 or math.isclose(before, asked):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the fit of the checkpoint had come to {asked:g} at step {done}, where this fit, by its arguments and length, "
        f"comes to {before:g}: what is pruned stays so, and rounds that ask for less are left out"
    )
    return {step: amount for step, amount in rounds.items() if step <= done or amount > asked}
