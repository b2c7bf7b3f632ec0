"""Plans what was chosen: KV heads that merge, the units that go, then whole blocks, and the weights of what makes up for them."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.kv_heads.plan import KVHeadPlan
from billhook.model.costs import cost_of, costs_of
from billhook.model.find import check_changeable, find_transformer
from billhook.model.layers import is_linear
from billhook.model.plan import ShapePlan, Weights, with_weights, without_inference_tensors
from billhook.model.surgery import UpdateOptimizers, change_blockwise, changed_names, restored_on_error
from billhook.pruning.amount import TARGETS, RowLength
from billhook.pruning.block_plan import BlockPlan, without_blocks
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import try_removal
from billhook.pruning.repair import repair_with
from billhook.pruning.target import RatioSearch, row_lengths
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, not_refitted_message, strip_argument
from billhook.shrinking.blocks import Block
from billhook.shrinking.candidates import Candidates
from billhook.shrinking.layers import alike_layers, removed_units
from billhook.shrinking.measurement import Measured
from billhook.shrinking.merging import plans_of
from billhook.tracing.trace import trace
from billhook.units.find import units_of
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
        removed = ", ".join(plan.words for plan in self.cuts if plan.units)
        return "; ".join([*(f"{plan.words}, merged" for plan in self.merged), *([removed] if removed else [])])


def plan(measured: Measured, limit: int, kept: Mapping[str, int], fitted: Sequence[Any], repair: RepairConfig | None) -> Planned:
    """Plans what was chosen, and repairs it from front to back; the model stays as it is.

    Where KV heads merge, what reads heads, and what feed-forwards end in, is refitted too, and optimizers restart for what is in
    another basis.

    Args:
        measured: What candidates lose.
        limit: The most that may be left; more is refused.
        kept: By layer, how many units it keeps, 0 where it goes with its block.
        fitted: Batches to fit to.
        repair: How linears are refitted; None: not at all.
    """
    if repair is not None:
        measured.progress.enter("repairing what was chosen")
    candidates, merging = measured.candidates, measured.merging
    model, search, layers, blocks = candidates.model, candidates.search, candidates.layers, candidates.blocks
    removed_blocks, cut = blocks.removed(kept), dict(kept)
    for group in alike_layers(layers, candidates.uniform):  # what goes with its block has no number, or one with those that stay
        number = max(kept[layer.name] for layer in group) or group[0].count
        cut |= {layer.name: number for layer in group if not kept[layer.name]}
    numbers, heads, equal = dict[str, list[int]](), dict[str, int](), LazyTensors({})
    for layer in layers:
        if merging is None or (layer.name, cut[layer.name]) not in merging.chosen:
            numbers |= removed_units(layer, search.units, measured.scores, cut[layer.name])
            continue
        heads |= dict.fromkeys(layer.names, cut[layer.name])
        if kept[layer.name]:
            equal |= merging.weights(layer, cut[layer.name])
    planned = plan_cuts(candidates, limit, numbers, removed_blocks, heads)
    zeros, units, unread = blocks.zeros(removed_blocks), planned.units, blocks.behind(removed_blocks)
    if heads:
        units = UnitPlan.of(find_cut(model, search.structure, search.units, numbers))  # of the model before heads merge
        unread = [name for name in _readers(search) if name not in zeros.modules]
    weights, left = equal, ""
    if repair is not None and (units.units or unread):
        refitted, left = refitted_if_enough(model, units, fitted, repair, equal | zeros, unread)
        weights = equal | refitted
    rebased = [name for name in changed_names(model, weights) if name in equal] if heads else []
    merged = list[KVHeadPlan]()
    for merge in planned.merged:
        inside = tuple(name for name in rebased if any(name.startswith(f"{layer}.") for layer in merge.layers))
        merged.append(replace(merge, restart=inside))
    return replace(planned, weights=weights or None, merged=tuple(merged), not_refitted=left)


def plan_cuts(
    candidates: Candidates,
    limit: int,
    numbers: Mapping[str, list[int]],
    removed_blocks: Sequence[Block],
    heads: Mapping[str, int],
) -> Planned:
    """Finds the plans by which heads merge and units and blocks go, as has been tried on meta tensors.

    Args:
        candidates: The model, and what may go.
        limit: The most that may be left; more is refused.
        numbers: The units that go, by layer.
        removed_blocks: The blocks that go.
        heads: By attention in which heads merge, how many it is to have.
    """
    search, target = candidates.search, candidates.target
    plans, merged = plans_of(search.model, heads)
    structure, units = search.structure, search.units
    if heads:
        structure = trace(merged)
        units = units_of(merged, structure, search.amount.kinds)
    cut = find_cut(merged, structure, units, numbers)
    costs = (costs_of(merged), costs_of(try_removal(merged, cut))) if heads else search.costs(cut)  # which a search remembers
    after, left = None, getattr(costs[1], target) if target in TARGETS else 0
    if removed_blocks:
        smaller = try_removal(merged, cut)
        after = candidates.blocks.planned(smaller, removed_blocks)
        left = cost_of(without_blocks(smaller, after), target) if target in TARGETS else 0
    left = int(left or 0)
    if left > limit:
        raise ValueError(f"{target}: {left:,} would be left, more than {limit:,}, as units do not all cost the same")
    rows = () if heads else _row_lengths(search, cut)
    return Planned(UnitPlan.of(cut, costs, rows), after, merged=tuple(plans), dense=search.now.params if heads else None)


def _readers(search: RatioSearch) -> list[str]:
    """Returns the linears that read heads, and those that feed-forwards end in."""
    readers = [reader for units in search.units.values() for reader in units.readers]
    readers += [member.name.rpartition(".")[0] for group in search.structure.feed_forward for member in group.down]
    return [name for name in dict.fromkeys(readers) if is_linear(search.model.get_submodule(name))]


def _row_lengths(search: RatioSearch, cut: Cut) -> tuple[RowLength, ...]:
    """Returns how long rows become, of kinds that are as long in all layers that become shorter."""
    if search.amount.round_to != "auto":
        return ()
    rows = row_lengths(search.model, cut, {name: left[0] for name, left in cut.after.items()})
    return tuple(row for row in rows if [other.kind for other in rows].count(row.kind) == 1)


def refitted_if_enough(
    model: nn.Module, units: UnitPlan, fitted: Sequence[Any], repair: RepairConfig, new: LazyTensors, refit: Collection[str]
) -> tuple[LazyTensors, str]:
    """Refits as `repair_with` does, or, where tokens are too few for what a search has chosen, not: the search is not lost.

    Returns:
        The new values, and what was cut and not refitted, and why.
    """
    left = list[str]()
    try:
        weights = repair_with(model, units, fitted, repair, new_params=new, also=refit, not_repaired=left)
    except NoRepair as error:
        words = f"not repaired: {strip_argument(error)}"
        warnings.warn(words, stacklevel=2)
        return LazyTensors({}), words
    return weights, not_refitted_message(left)


@contextmanager
def as_planned(model: PreTrainedModel, planned: Planned) -> Iterator[None]:
    """Lets the model compute what it will once plans have been carried out, until the end of a `with` block."""
    with ExitStack() as stack:
        stack.enter_context(store_of(model).computing_with(LazyTensors.of(planned.weights or {})))
        for cut in planned.cuts:
            if cut.units:
                stack.enter_context(mask(model, cut))
        yield


def apply_in_turn(
    model: nn.Module, plans: Iterable[ShapePlan], optimizers: Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Carries out plans one after the other, each asked for once those before it have been, or none; see `apply`."""
    check_changeable(model)
    subject, follows = find_transformer(model), list[UpdateOptimizers]()
    undone = store_of(subject).restored_on_error(), restored_on_error(model)
    with torch.inference_mode(mode=False), with_weights(subject, without_inference_tensors(weights)), undone[0], undone[1]:
        for shape_plan in plans:
            follows.append(shape_plan.change(model))
        change_blockwise(subject, {})  # blocks of which no plan has cut anything keep their new values, too
    trained_by = list(optimizers)
    for follow in follows:
        follow(trained_by)
