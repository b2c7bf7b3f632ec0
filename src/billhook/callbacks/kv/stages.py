"""When attentions have fewer KV heads, and when their heads begin to move."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from billhook.arguments import whole
from billhook.callbacks.kv.preparation import Preparation
from billhook.fit.events.rounds import At, step_of
from billhook.schedules import Schedule, check_step


@dataclass(frozen=True)
class Stage:
    """Some attentions have fewer KV heads from a step on."""

    step: int  # -1 for before the optimizer exists
    heads: int
    share: float = 1.0  # of all attentions, which has as few by then
    over: int = 0  # for so many steps before, the heads of a group move towards each other

    @property
    def begin(self) -> int:
        """The step after which heads begin to move."""
        return self.step - self.over


def steps_over(over: int | float, total: int | None) -> int:
    """Returns for how many steps heads move towards each other; of a fraction of training one at least."""
    return max(1, step_of(over, total, name="over")) if isinstance(over, float) and over else int(over)


def check_heads(num_key_value_heads: int | list[int], at: Sequence[At | Schedule]) -> list[int]:
    """Returns the KV heads of all stages; refuses those that do not fall, each dividing the one before, one for each moment."""
    heads = list(num_key_value_heads) if isinstance(num_key_value_heads, list | tuple) else [num_key_value_heads]
    if len(heads) != len(at) or not heads:
        raise ValueError(f"num_key_value_heads={heads} and at={at} must have the same length, one at least")
    if len(heads) > 1 and any(isinstance(moment, Schedule) for moment in at):
        raise ValueError(f"at={at}: a schedule goes with one number of heads, not with num_key_value_heads={heads}")
    for number in heads:
        whole("num_key_value_heads", number)
    if any(before <= after or before % after for before, after in pairwise(heads)):
        raise ValueError(f"num_key_value_heads={heads}: each stage must have fewer heads than the one before, and divide it")
    return heads


def check_over(over: int | float, moments: Sequence[At | Schedule], preparation: Preparation) -> None:
    """Refuses a way between heads and what they become where there is none."""
    check_step(over, "over")
    if not over:
        return
    if "start" in moments:
        raise ValueError(f"over={over}: before at='start' there are no steps in which heads could move: give a later step")
    if preparation.repair is not None:
        raise ValueError(f"over={over} and repair: heads that have moved lose nothing when they are cut; leave one out")
    if not preparation.method.has_path:
        raise ValueError(
            f"over={over}: method='{preparation.method.name}' has no path between the heads and what they become; 'mean', "
            "'first' and 'aligned' have one"
        )


def check_order(stages: Sequence[tuple[Stage, object]]) -> None:
    """Refuses stages that do not lead to ever fewer heads, each dividing those before, or that begin before another has ended.

    Each comes with what it is of: those of one that have the same number convert one attention after another.
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
