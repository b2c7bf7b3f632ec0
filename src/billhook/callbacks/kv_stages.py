"""When attentions have fewer KV heads, and when their heads begin to move."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from billhook.schedules import Schedule, resolve_step


@dataclass(frozen=True)
class Stage:
    """Some attentions have fewer KV heads from a step on.

    Attributes:
        step: The optimizer step after which they have; -1 for before the optimizer exists.
        heads: How many.
        share: Which share of all attentions has as few by then.
        over: For how many steps before that the heads of a group move towards each other.
    """

    step: int
    heads: int
    share: float = 1.0
    over: int = 0

    @property
    def begin(self) -> int:
        """The step after which heads begin to move."""
        return self.step - self.over


def shares_of(schedule: Schedule, total: int, trial: bool) -> dict[int, float]:
    """From which step on which share has been converted.

    Args:
        schedule: The share at each step.
        total: Steps of training.
        trial: Whether it is a trial, which may be shorter than the schedule: then there is only the end of it.

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
        raise ValueError(f"at={schedule}: it says which share has been converted, and must rise to 1 before training ends")
    return shares


def steps_over(over: int | float, total: int) -> int:
    """For how many steps heads move towards each other; of a fraction of training one at least."""
    return max(1, resolve_step(over, total, "over")) if isinstance(over, float) and over else int(over)


def check_order(stages: Sequence[tuple[Stage, object]]) -> None:
    """Refuses stages that do not lead to ever fewer heads, each dividing those before, or that begin before another has ended.

    Args:
        stages: Each with what it is of; those of one that have the same number convert one attention after another.

    Raises:
        ValueError: With what contradicts.
    """
    ordered = sorted(stages, key=lambda pair: pair[0].step)
    for (before, one), (after, other) in zip(ordered, ordered[1:], strict=False):
        goes_on = one is other and before.heads == after.heads
        if not goes_on and (before.heads <= after.heads or before.heads % after.heads):
            told = ", ".join(f"{stage.heads} at step {max(stage.step, 0)}" for stage, _ in ordered)
            raise ValueError(
                f"num_key_value_heads: each stage must have fewer KV heads than the one before, and divide it; got {told}"
            )
    earlier = 0
    for stage, _ in ordered:
        if stage.over and stage.begin < earlier:
            since = f"since the stage at step {earlier}" if earlier else "since training began"
            raise ValueError(
                f"over={stage.over} steps must fit in before the stage at step {stage.step}, and there are "
                f"{stage.step - earlier} {since}"
            )
        earlier = max(stage.step, 0)
