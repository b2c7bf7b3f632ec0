"""Steps and target amounts of events."""

import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from billhook.fit.fit import Fit
from billhook.schedules import Schedule, Step, check_step, resolve_step

Targets = dict[int, float]
"""Target amounts by step."""
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


def round_targets(amount: float | Schedule, at: At | Schedule, fit: Fit, name: str) -> Targets:
    """Returns the target amount by step; in a `fast_dev_run` only the last round.

    Args:
        amount: A fraction, or a schedule of it.
        at: Step or fraction of training, or a schedule of the share of the amount.
        fit: The training run.
        name: Name of the amount's argument.
    """
    if isinstance(amount, Schedule):
        rounds = _values(amount, fit, name)
        for step, value in rounds.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
        for higher, lower in pairwise(rounds.values()):
            if lower < higher:
                raise ValueError(
                    f"{name}: the schedule decreases from {higher:g} to {lower:g}, but pruning cannot be undone. Use an "
                    "increasing one."
                )
        return rounds
    if not isinstance(at, Schedule):
        return {resolve_at(at, fit): amount}
    shares = _values(at, fit, f"at={at}")
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={at} must increase from 0 to 1, but is {value:g} at step {step} after {before:g}.")
    if max(shares.values(), default=0) < 1:
        raise ValueError(
            f"at={at} is the share of the amount to prune and must reach 1 before training ends. Set the total by the amount."
        )
    return {step: share * amount for step, share in shares.items()}


def _values(schedule: Schedule, fit: Fit, name: str) -> Targets:
    """Returns the values of a schedule by step; in a trial only the final value."""
    total = fit.length
    if total is None:
        raise ValueError(f"{name}: a schedule requires a known training length. Set Trainer(max_steps=...).")
    if fit.is_trial:
        return {total: schedule.bind(sys.maxsize)(sys.maxsize)}
    bound = schedule.bind(total)
    return {step: bound(step) for step in bound.changes(total)}


def resolve_at(at: At, fit: Fit) -> int:
    """Returns the step of `at`; 0 for the start, and at most the last step in a trial."""
    if at == "start":
        return 0
    total = fit.length
    if total is None and isinstance(at, float):
        raise ValueError(f"at={at} is a fraction of an unknown training length. Set Trainer(max_steps=...), or use a step.")
    capped = min(at, total or 0) if fit.is_trial and isinstance(at, int) else at
    return resolve_step(capped, sys.maxsize if total is None else total, "at")


def remaining_rounds(rounds: Mapping[int, float], last_step: int, target: float, name: str) -> Targets:
    """Drops rounds below the target of a resumed run with another schedule or length."""
    before = max((amount for step, amount in rounds.items() if step <= last_step), default=0.0)
    if last_step < 0 or math.isclose(before, target):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the checkpoint's run reached {target:g} at step {last_step}, where this run has {before:g}. Pruning is not "
        f"undone, and rounds below {target:g} are skipped."
    )
    return {step: amount for step, amount in rounds.items() if step <= last_step or amount > target}
