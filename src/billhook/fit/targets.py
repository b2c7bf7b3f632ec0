"""Steps and target amounts of events."""

import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from billhook.fit.fit import Fit
from billhook.schedules import Schedule, Step, check_step, resolve_step

At = Step | Literal["start"]
"""A step (int), a fraction of training (float in 0..1), or `"start"`.

`ratio=Linear(final=0.5)` schedules the amount itself; `at=Linear(final=1.0)` schedules the share of the amount.
"""


def check_at(at: At | Schedule, amount: object = None) -> None:
    """Raises `ValueError` if `at` is not legal or contradicts a schedule of the amount."""
    if isinstance(at, str) and at != "start":
        raise ValueError(f"at={at!r} must be 'start', an int (a step) or a float in 0..1 (a fraction of training)")
    if not isinstance(at, Schedule | str):
        check_step(at, "at")
    if isinstance(amount, Schedule) and at != "start":
        raise ValueError(f"at={at!r} conflicts with the schedule of the amount. Set start and end of the schedule instead.")


def round_targets(amount: float | Schedule, at: At | Schedule, total: int | None, fit: Fit, name: str) -> dict[int, float]:
    """Returns the target amount by step; in a `fast_dev_run` only the last round.

    Args:
        amount: A fraction, or a schedule of it.
        at: Step or fraction of training, or a schedule of the share of the amount.
        total: Number of training steps; None if unknown.
        fit: The training run.
        name: Name of the amount's argument.
    """
    trial = fit.is_trial
    if isinstance(amount, Schedule):
        return _amounts(amount, total, trial, name)
    if isinstance(at, Schedule):
        return {step: share * amount for step, share in share_targets(at, total, trial).items()}
    return {resolve_at(at, total, trial): amount}


def _values(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    """Returns the values of a schedule by step; in a trial only the final value."""
    if total is None:
        raise ValueError(f"{name}: a schedule requires a known training length. Set Trainer(max_steps=...).")
    bound = schedule.bind(sys.maxsize if trial else total)
    return {total: bound(sys.maxsize)} if trial else {step: bound(step) for step in bound.changes(total)}


def _amounts(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    rounds = _values(schedule, total, trial, name)
    for step, value in rounds.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
    for higher, lower in pairwise(rounds.values()):
        if lower < higher:
            raise ValueError(
                f"{name}: the schedule decreases from {higher:g} to {lower:g}, but pruning cannot be undone. Use an increasing "
                "one."
            )
    return rounds


def share_targets(schedule: Schedule, total: int | None, trial: bool) -> dict[int, float]:
    """Returns the share of the amount by step; raises `ValueError` unless it increases to 1."""
    shares = _values(schedule, total, trial, f"at={schedule}")
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={schedule} must increase from 0 to 1, but is {value:g} at step {step} after {before:g}.")
    if max(shares.values(), default=0) < 1:
        raise ValueError(
            f"at={schedule} is the share of the amount to prune and must reach 1 before training ends. Set the total by the "
            "amount."
        )
    return shares


def resolve_at(at: At, total: int | None, trial: bool = False) -> int:
    """Returns the step of `at`; 0 for the start, and at most the last step in a trial."""
    if at == "start":
        return 0
    if total is None and isinstance(at, float):
        raise ValueError(f"at={at} is a fraction of an unknown training length. Set Trainer(max_steps=...), or use a step.")
    capped = min(at, total or 0) if trial and isinstance(at, int) else at
    return resolve_step(capped, sys.maxsize if total is None else total, "at")


def remaining_rounds(rounds: Mapping[int, float], last_step: int, target: float, name: str) -> dict[int, float]:
    """Drops rounds below the target of a resumed run with another schedule or length."""
    before = max((amount for step, amount in rounds.items() if step <= last_step), default=0.0)
    if last_step < 0 or math.isclose(before, target):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the checkpoint's run reached {target:g} at step {last_step}, where this run has {before:g}. Pruning is not "
        f"undone, and rounds below {target:g} are skipped."
    )
    return {step: amount for step, amount in rounds.items() if step <= last_step or amount > target}
