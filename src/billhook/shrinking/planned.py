"""Plans what was chosen: the units that go, then the whole blocks, and the weights of what makes up for them."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.kv_heads.plan import KVHeadPlan
from billhook.model.figures import figure_of
from billhook.model.find import check_changeable, find_transformer
from billhook.model.plan import ShapePlan, Weights, starting_from, usable
from billhook.model.surgery import Follow, change_in_turn, undone_by_errors
from billhook.pruning.amount import TARGETS, RowLength
from billhook.pruning.block_plan import BlockPlan, without
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import tried
from billhook.pruning.repair import repair_with
from billhook.pruning.target import Search, row_lengths
from billhook.repairs.moments import NoRepair, not_refitted, without_name
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.blocks import Block, Blocks
from billhook.units.gates import mask


@dataclass(frozen=True)
class Planned:
    """Holds what is carried out in turn: plans of KV heads that merge, one of units, one of blocks, if any go, and weights.

    Where heads merge, the parameters of the dense model are told besides; and so is what was cut and not refitted, and why.
    """

    units: UnitPlan
    blocks: BlockPlan | None = None
    weights: Weights | None = None
    merged: tuple[KVHeadPlan, ...] = ()
    dense: int | None = None
    not_refitted: str = ""

    @property
    def cuts(self) -> list[UnitPlan | BlockPlan]:
        """The plans by which something is removed, in their order."""
        return [self.units] if self.blocks is None else [self.units, self.blocks]

    @property
    def plans(self) -> list[KVHeadPlan | UnitPlan | BlockPlan]:
        """The plans, in their order."""
        return [*self.merged, *self.cuts]

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters, before and after."""
        return self.dense or self.units.parameters[0], self.cuts[-1].parameters[1]

    @property
    def words(self) -> str:
        """The words for what is merged and removed."""
        gone = ", ".join(plan.words for plan in self.cuts if plan.units)
        return "; ".join([*(f"{plan.words}, merged" for plan in self.merged), *([gone] if gone else [])])


def plan_choice(
    search: Search,
    target: str,
    limit: int,
    numbers: Mapping[str, list[int]],
    blocks: Blocks,
    gone: Sequence[Block],
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
        left = int(figure_of(without(smaller, after), target) or 0) if target in TARGETS else 0
    else:
        left = search.cost(cut, target) if target in TARGETS else 0
    if target in TARGETS and left > limit:
        raise ValueError(f"{target}: {left:,} would be left, more than {limit:,}, as units do not all cost the same")
    return Planned(UnitPlan.of(cut, search.costs(cut), rows=_row_lengths(search, cut)), after)


def _row_lengths(search: Search, cut: Cut) -> tuple[RowLength, ...]:
    """Returns how long rows become, of kinds that are as long in all places that become shorter."""
    if search.amount.round_to != "auto":
        return ()
    asked = {name: left[0] for name, left in cut.after.items()}
    rows = row_lengths(search.model, cut, asked)
    return tuple(row for row in rows if [other.kind for other in rows].count(row.kind) == 1)


def refitted_if_enough(
    model: nn.Module, plan: UnitPlan, fitted: Sequence[Any], repair: RepairConfig, given: LazyTensors, whole: Collection[str]
) -> tuple[LazyTensors, str]:
    """Refits as `repair_with` does, or, where tokens are too few for what a search has chosen, not: the search is not lost.

    Returns:
        The new values, and what was cut and not refitted, and why.
    """
    left = list[str]()
    try:
        weights = repair_with(model, plan, fitted, repair, given=given, whole=whole, left=left)
    except NoRepair as error:
        words = f"not repaired: {without_name(error)}"
        warnings.warn(words, stacklevel=2)
        return LazyTensors({}), words
    return weights, not_refitted(left)


@contextmanager
def as_planned(model: PreTrainedModel, planned: Planned) -> Iterator[None]:
    """Lets the model compute what it will once plans have been carried out, until the end of a `with` block."""
    with ExitStack() as stack:
        stack.enter_context(store_of(model).computing_with(LazyTensors.of(planned.weights or {})))
        for plan in planned.cuts:
            if plan.units:
                stack.enter_context(mask(model, plan))
        yield


def apply_in_turn(
    model: nn.Module, plans: Iterable[ShapePlan], optimizers: Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Carries out plans one after the other, each asked for once those before it have been, or none; see `apply`."""
    check_changeable(model)
    subject, follows = find_transformer(model), list[Follow]()
    undone = store_of(subject).following(), undone_by_errors(model)
    with torch.inference_mode(mode=False), starting_from(subject, usable(weights)), undone[0], undone[1]:
        for plan in plans:
            follows.append(plan.change(model))
        change_in_turn(subject, {})  # blocks of which no plan has cut anything keep their new values, too
    trained_by = list(optimizers)
    for follow in follows:
        follow(trained_by)
