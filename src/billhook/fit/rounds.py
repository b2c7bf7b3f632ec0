"""When something is pruned in a fit, and how much of it."""

import math
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise

from lightning_utilities.core.rank_zero import rank_zero_warn

from billhook.fit.event import At
from billhook.schedules import Schedule, check_step, resolve_step
from billhook.sparsity.masks import check_amount


def check_times(sparsity: float | Schedule | None, pattern: str, at: At) -> None:
    """Checks what can be said before the length of training is known.

    Raises:
        ValueError: If sparsity, pattern and time are not legal or contradict each other.
    """
    if not isinstance(sparsity, Schedule):
        check_amount(sparsity, pattern)
    elif at != "start":
        raise ValueError(f"at={at!r}: the schedule says when; give it start and end instead")
    elif pattern != "unstructured":
        raise ValueError(f"pattern={pattern!r} is a sparsity of its own, which a schedule contradicts: give at instead")
    if at != "start":
        check_step(at, "at")


def find_rounds(
    amount: float | Schedule | None, at: At, total: int | None, trial: bool, name: str = "sparsity"
) -> dict[int, float | None]:
    """From which step how much is pruned.

    Args:
        amount: A fraction, or a schedule of it.
        at: When, if it is no schedule.
        total: Steps of training; None where that is not known.
        trial: Whether it is a trial, which may be shorter than the schedule: then there is only the last round.
        name: What the amount is called.

    Raises:
        ValueError: If the length must be known and is not, or a schedule goes down or leaves [0, 1).
    """
    if not isinstance(amount, Schedule):
        return {_moment(at, total, trial): amount}
    if total is None:
        raise ValueError(f"{name}: a schedule needs the length of training, which is not known: set max_steps")
    if trial:
        rounds = {total: amount.bind(sys.maxsize)(sys.maxsize)}
    else:
        bound = amount.bind(total)
        rounds = {step: bound(step) for step in amount.changes(total)}
    for step, value in rounds.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
    for higher, lower in pairwise(rounds.values()):
        if lower < higher:
            raise ValueError(f"{name}: the schedule goes down, from {higher:g} to {lower:g}: what is pruned does not come back")
    return dict(rounds)


def still_due(
    rounds: Mapping[int, float | None], done: int, asked: float | None, amount: Callable[[float | None], float], name: str
) -> dict[int, float | None]:
    """The rounds without those that would give back what is pruned, as may be where a resumed fit has another schedule or length.

    Args:
        rounds: All rounds of the fit.
        done: The last step by which rounds have been carried out; -1 for none.
        asked: How much was asked for by then; None where that is not known.
        amount: What a round asks for, as a fraction.
        name: What the amount is called.
    """
    before = max((amount(value) for step, value in rounds.items() if step <= done), default=0.0)
    if done < 0 or asked is None or math.isclose(before, asked):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the fit of the checkpoint had come to {asked:g} at step {done}, where this fit, by its arguments and length, "
        f"comes to {before:g}: what is pruned stays so, and rounds that ask for less are left out"
    )
    return {step: value for step, value in rounds.items() if step <= done or amount(value) > asked}


def _moment(at: At, total: int | None, trial: bool) -> int:
    if at == "start":
        return 0
    if total is None and isinstance(at, float):
        raise ValueError(f"at={at} is a fraction of training, whose length is not known: set max_steps")
    moment = min(at, total) if trial and isinstance(at, int) and total is not None else at
    return resolve_step(moment, int(moment) if total is None else total, "at")


def shares_of(schedule: Schedule, total: int, trial: bool, what: str) -> dict[int, float]:
    """From which step on which share has been done.

    Args:
        schedule: The share at each step.
        total: Steps of training.
        trial: Whether it is a trial, which may be shorter than the schedule: then there is only the end of it.
        what: What the schedule says, in words.

    Raises:
        ValueError: If the schedule falls, exceeds 1, or does not come to 1.
    """
    if total == sys.maxsize:
        raise ValueError(f"at={schedule}: a schedule needs the length of training, which is not known: set max_steps")
    bound = schedule.bind(sys.maxsize if trial else total)
    shares = {total: bound(sys.maxsize)} if trial else {step: bound(step) for step in bound.changes(total)}
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={schedule}: it must rise to 1 at most, and is {value:g} at step {step} after {before:g}")
    if max(shares.values(), default=0) < 1:
        raise ValueError(f"at={schedule}: it says {what}, and must rise to 1 before training ends")
    return shares
