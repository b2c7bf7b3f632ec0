"""A schedule that says which share of something has been done by which step."""

import sys

from billhook.schedules import Schedule


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
