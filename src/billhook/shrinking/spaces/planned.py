"""Plans what was chosen: the units that go, then the whole blocks, and the weights of what makes up for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.model.figures import figures_of
from billhook.model.plan import Weights
from billhook.pruning.amount import TARGETS
from billhook.pruning.block_plan import BlockPlan, without
from billhook.pruning.cuts import find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import tried
from billhook.pruning.repair import repair_with
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.shrinking.spaces.blocks import Block, Blocks


@dataclass(frozen=True)
class Planned:
    """Holds what is carried out one after the other: a plan of units, one of blocks, if any go, and repaired weights."""

    units: UnitPlan
    blocks: BlockPlan | None = None
    weights: Weights | None = None

    @property
    def plans(self) -> list[UnitPlan | BlockPlan]:
        """The plans, in their order."""
        return [self.units] if self.blocks is None else [self.units, self.blocks]

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters, before and after."""
        return self.units.parameters[0], self.plans[-1].parameters[1]

    @property
    def words(self) -> str:
        """The words for what is removed."""
        return ", ".join(plan.words for plan in self.plans if plan.units)


def plan_choice(
    search: Search, target: str, limit: int, numbers: Mapping[str, list[int]], blocks: Blocks, gone: Sequence[Block]
) -> Planned:
    """Finds the plans by which units and blocks go, as has been tried on meta tensors; refuses what is larger than a limit.

    Args:
        search: The model, and what it costs.
        target: What is limited.
        limit: The most that may be left.
        numbers: The units that go, by place.
        blocks: The blocks that could go.
        gone: Those that do.
    """
    cut, after = find_cut(search.model, search.structure, search.units, numbers), None
    if gone:
        smaller = tried(search.model, cut)
        after = blocks.planned(smaller, gone)
        left = int(getattr(figures_of(without(smaller, after)), target, 0) or 0)
    else:
        left = search.cost(cut, target) if target in TARGETS else 0
    if target in TARGETS and left > limit:
        raise ValueError(f"{target}: {left:,} would be left, more than {limit:,}, as units do not all cost the same")
    return Planned(UnitPlan.of(cut, search.costs(cut)), after)


def repaired(planned: Planned, blocks: Blocks, gone: Sequence[Block], fitted: Sequence[Any], repair: Repair | None) -> Planned:
    """Refits linears from front to back, those behind the first block that goes too; the model stays as it is."""
    whole = blocks.behind(gone) if gone else []
    if repair is None or not (planned.units.units or whole):
        return planned
    weights = repair_with(blocks.model, planned.units, fitted, repair, given=blocks.zeros(gone), whole=whole)
    return Planned(planned.units, planned.blocks, weights)
