"""Plans a selected candidate: pooled heads, removed units and blocks, repaired weights."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.kv_heads.distance import EqualHeads
from billhook.kv_heads.layout import ties_of
from billhook.kv_heads.plan import KVHeadPlan
from billhook.model.costs import cost_of, costs_of
from billhook.model.find import check_changeable, find_transformer
from billhook.model.layers import is_linear
from billhook.model.plan import ShapePlan, Weights, with_weights, without_inference_tensors
from billhook.model.rotary import RopeParameters, rotating
from billhook.model.surgery import UpdateOptimizers, change_blockwise, changed_names, restored_on_error
from billhook.pruning.amount import TARGETS, RowLength
from billhook.pruning.block_plan import BlockPlan, without_blocks
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import try_removal
from billhook.pruning.repair import repair_with
from billhook.pruning.target import RatioSearch, row_lengths
from billhook.repairs.matching import Tie
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, not_refitted_message, strip_argument
from billhook.shrinking.blocks import Block
from billhook.shrinking.measurement import Measurement
from billhook.shrinking.modules import removed_units, uniform_groups
from billhook.shrinking.pooling import FREE, METHOD, pooling_plans
from billhook.shrinking.scope import SearchScope
from billhook.tracing.trace import trace
from billhook.units.find import units_of
from billhook.units.gates import mask


@dataclass(frozen=True)
class ShrinkPlan:
    """Plans for pooling KV heads, removing units, and removing blocks, applied in order.

    Attributes:
        units: The units to remove.
        blocks: The blocks to remove, if any.
        weights: Repaired weights.
        merged: Conversions to fewer KV heads, one for each number of heads.
        dense: Number of parameters of the dense model, if heads are pooled.
        left: Remaining cost, for a target that plans have a cost of.
        not_refitted: Names of layers that were pruned but not refitted, with the reason; empty if there are none.
    """

    units: UnitPlan
    blocks: BlockPlan | None = None
    weights: Weights | None = None
    merged: tuple[KVHeadPlan, ...] = ()
    dense: int | None = None
    left: int = 0
    not_refitted: str = ""

    @property
    def cuts(self) -> list[UnitPlan | BlockPlan]:
        """The plans that remove units or blocks, in order."""
        return [self.units] if self.blocks is None else [self.units, self.blocks]

    @property
    def plans(self) -> list[KVHeadPlan | UnitPlan | BlockPlan]:
        """All plans, in order."""
        return [*self.merged, *self.cuts]

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters before and after."""
        return self.dense or self.units.parameters[0], self.cuts[-1].parameters[1]

    @property
    def words(self) -> str:
        """A summary of the plans."""
        removed = ", ".join(plan.words for plan in self.cuts if plan.units)
        return "; ".join(filter(None, [*(f"{plan.words} (pooled)" for plan in self.merged), removed]))


def plan(
    measurement: Measurement, limit: int, kept: Mapping[str, int], fitted: Sequence[Any], repair: RepairConfig | None
) -> ShrinkPlan:
    """Plans a candidate and repairs it from front to back, without changing the model.

    If KV heads are pooled, the output layers of attention and MLP modules are refitted too, and optimizer state restarts for
    parameters in a new basis.

    Args:
        measurement: Losses of the variants.
        limit: Largest allowed cost; above it, a ValueError is raised.
        kept: Number of kept units by module, 0 if its block is removed.
        fitted: Batches for fitting.
        repair: Settings of the refits; None keeps the old weights.
    """
    if repair is not None:
        measurement.progress.enter("repairing the selected model")
    scope, pooling = measurement.scope, measurement.pooling
    search, blocks = scope.search, scope.blocks
    removed_blocks, numbers, heads, equal = blocks.removed(kept), dict[str, list[int]](), dict[str, int](), LazyTensors({})
    levels = _levels_in_config(scope, kept)
    for module in scope.modules:
        level = levels[module.name]
        if pooling is None or (module.name, level) not in pooling.chosen:
            numbers |= removed_units(module, search.units, measurement.scores, level)
            continue
        heads |= dict.fromkeys(module.names, level)
        if kept[module.name]:
            equal |= pooling.weights(module, level)
    planned = plan_cuts(scope, limit, numbers, removed_blocks, heads)
    zeros, units, extra = blocks.zeros(removed_blocks), planned.units, blocks.behind(removed_blocks)
    if heads:
        units = UnitPlan.of(find_cut(scope.model, search.structure, search.units, numbers))  # of the model before pooling
        extra = _output_layers(search, zeros.modules)
    new, ties = EqualHeads(equal), dict[str, Tie]()
    if pooling is not None and heads:
        new = pooling.with_frequencies(heads, equal, fitted, measurement.divergence)
        ties = ties_of(scope.model, pooling.attentions.projections, heads)
    weights, not_repaired = new.values, ""
    if repair is not None and (units.units or extra):
        changes = new.values | zeros
        refitted, not_repaired = refitted_if_enough(scope.model, units, fitted, repair, changes, extra, new.rope, ties)
        weights = new.values | refitted.without(zeros)  # removed blocks take no new values
    rebased = [name for name in changed_names(scope.model, weights) if name in new.values] if heads else []
    method, pooled = METHOD if new.rope is None else FREE, list[KVHeadPlan]()
    for of_heads in planned.merged:
        restart = _inside(rebased, of_heads.layers)
        pooled.append(replace(of_heads.starting_from(restart, new.rope), method=method))
    return replace(planned, weights=weights or None, merged=tuple(pooled), not_refitted=not_repaired)


def _levels_in_config(scope: SearchScope, kept: Mapping[str, int]) -> dict[str, int]:
    """Returns levels in which modules of removed blocks match the kept modules."""
    levels = dict(kept)
    for group in uniform_groups(scope.modules, scope.uniform):
        number = max(kept[module.name] for module in group) or group[0].count
        levels |= {module.name: number for module in group if not kept[module.name]}
    return levels


def _inside(parameters: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Returns the parameters that belong to some modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return tuple(name for name in parameters if name.startswith(prefixes))


def plan_cuts(
    scope: SearchScope,
    limit: int,
    numbers: Mapping[str, list[int]],
    removed_blocks: Sequence[Block],
    heads: Mapping[str, int],
) -> ShrinkPlan:
    """Plans pooling and removal, as tried on the meta device.

    Args:
        scope: The prunable modules and blocks.
        limit: Largest allowed cost; above it, a ValueError is raised.
        numbers: The units to remove, by module.
        removed_blocks: The blocks to remove.
        heads: By attention module with pooled heads, its new number of KV heads.
    """
    search, target = scope.search, scope.target
    plans, pooled_model = pooling_plans(search.model, heads)
    structure, units = search.structure, search.units
    if heads:
        structure = trace(pooled_model)
        units = units_of(pooled_model, structure, search.amount.kinds)
    cut = find_cut(pooled_model, structure, units, numbers)
    smaller = try_removal(pooled_model, cut) if heads or removed_blocks else None
    costs = (costs_of(pooled_model), costs_of(smaller)) if heads and smaller else search.costs(cut)  # cached by the search
    after, left = None, getattr(costs[1], target) if target in TARGETS else 0
    if removed_blocks and smaller:
        after = scope.blocks.planned(smaller, removed_blocks)
        left = cost_of(without_blocks(smaller, after), target) if target in TARGETS else 0
    left = int(left or 0)
    if left > limit:
        raise ValueError(
            f"{target}: the plan leaves {left:,}, more than the limit {limit:,}, because costs per unit differ. Try another "
            "budget."
        )
    rows = () if heads else _row_lengths(search, cut)
    dense = search.now.params if heads else None
    return ShrinkPlan(UnitPlan.of(cut, costs, rows), after, merged=tuple(plans), dense=dense, left=left)


def _output_layers(search: RatioSearch, removed: Collection[str]) -> list[str]:
    """Returns the kept linear layers that consume heads, and the last ones of MLP modules."""
    names = list[str]()
    for units in search.units.values():
        names += units.readers
    for mlp in search.structure.feed_forward:
        names += [member.name.rpartition(".")[0] for member in mlp.down]
    return [name for name in dict.fromkeys(names) if name not in removed and is_linear(search.model.get_submodule(name))]


def _row_lengths(search: RatioSearch, cut: Cut) -> tuple[RowLength, ...]:
    """Returns the new row lengths, for kinds with a common length in all pruned layers."""
    if search.amount.round_to != "auto":
        return ()
    rows = row_lengths(search.model, cut, {name: left[0] for name, left in cut.after.items()})
    lengths = Counter(map(attrgetter("kind"), rows))
    return tuple(row for row in rows if lengths[row.kind] == 1)


def refitted_if_enough(
    model: nn.Module,
    units: UnitPlan,
    fitted: Sequence[Any],
    repair: RepairConfig,
    new: LazyTensors,
    refit: Collection[str],
    rope: RopeParameters | None = None,
    ties: Mapping[str, Tie] | None = None,
) -> tuple[LazyTensors, str]:
    """Refits like `repair_with`, or warns and skips the refit if there are too few tokens.

    Returns:
        The new weights, and the layers that were pruned but not refitted, with the reason.
    """
    left = list[str]()
    try:
        weights = repair_with(model, units, fitted, repair, new_params=new, also=refit, not_repaired=left, rope=rope, ties=ties)
    except NoRepair as error:
        words = f"not repaired: {strip_argument(error)}"
        warnings.warn(words, stacklevel=2)
        return LazyTensors({}), words
    return weights, not_refitted_message(left)


@contextmanager
def simulated(model: PreTrainedModel, planned: ShrinkPlan) -> Iterator[None]:
    """Runs the model as if a plan had been applied, within a `with` block."""
    with ExitStack() as stack:
        stack.enter_context(store_of(model).computing_with(LazyTensors.of(planned.weights or {})))
        for of_heads in planned.merged[:1]:  # all rotate with the same frequencies
            stack.enter_context(rotating(model, of_heads.rope))
        for cut in planned.cuts:
            if cut.units:
                stack.enter_context(mask(model, cut))
        yield


def apply_plans(
    model: nn.Module, plans: Iterable[ShapePlan], optimizers: Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Applies plans in order, all or none. See `apply`."""
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
