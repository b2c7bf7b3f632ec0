"""Plans a selected candidate: removed units and blocks, repaired weights."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.engine import LazyTensors, store_of
from billhook.model import (
    ShapePlan,
    Weights,
    change_blockwise,
    check_changeable,
    cost_of,
    find_transformer,
    restored_on_error,
    with_weights,
    without_inference_tensors,
)
from billhook.pruning.block_plan import BlockPlan, find_block_plan, without_blocks, writers_behind, zero_weights
from billhook.pruning.cut import find_cut, of_ranks
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import try_removal
from billhook.pruning.repair import repair_with
from billhook.pruning.target import width_notes
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, not_refitted_message, strip_argument
from billhook.shrinking.measurement import Measurement
from billhook.shrinking.modules import removed_units, uniform_groups
from billhook.units import UnitNumbers, consumer_columns, mask


@dataclass(frozen=True)
class ShrinkPlan:
    """Plans for removing units and blocks, applied in order.

    Attributes:
        units: The units to remove.
        blocks: The blocks to remove, if any.
        weights: Repaired weights.
        not_refitted: Names of layers that were pruned but not refitted, with the reason; empty if there are none.
    """

    units: UnitPlan
    blocks: BlockPlan | None = None
    weights: Weights | None = None
    not_refitted: str = ""

    @property
    def plans(self) -> list[UnitPlan | BlockPlan]:
        """The plans, in order."""
        return [self.units] if self.blocks is None else [self.units, self.blocks]

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters before and after."""
        return self.units.parameters[0], self.plans[-1].parameters[1]

    @property
    def words(self) -> str:
        """A summary of the plans."""
        return ", ".join(plan.words for plan in self.plans if plan.units)


def plan_choice(
    measurement: Measurement, limit: int, kept: Mapping[str, int], repair_batches: Sequence[Any], repair: RepairConfig | None
) -> ShrinkPlan:
    """Plans a candidate and repairs it from front to back, without changing the model.

    Args:
        measurement: Losses of the variants.
        limit: Largest allowed cost; above it, a ValueError is raised.
        kept: Number of kept units by module, 0 if its block is removed.
        repair_batches: Batches for fitting.
        repair: Settings of the refits; None keeps the old weights.
    """

    def repaired(done: int, total: int) -> None:
        measurement.progress.enter(f"repairing the selected model, {done} of {total} layers")

    if repair is not None:
        measurement.progress.enter("repairing the selected model")
    scope, blocks = measurement.scope, measurement.scope.blocks
    removed_blocks = [block.number for block in blocks.removed(kept)]
    planned = plan_removal(measurement, limit, kept, removed_blocks)
    behind = writers_behind(blocks.writers, removed_blocks)
    if repair is None or not (planned.units.units or behind):
        return planned
    not_refitted = list[str]()
    zeros = zero_weights(scope.model, [name for number in removed_blocks for name in blocks.writers[number]])
    try:
        refitted = repair_with(
            scope.model,
            planned.units,
            repair_batches,
            repair,
            new_params=zeros,
            also=behind,
            progress=repaired,
            not_repaired=not_refitted,
        )
    except NoRepair as error:
        reason = f"not repaired: {strip_argument(error)}"
        warnings.warn(reason, stacklevel=2)
        return replace(planned, not_refitted=reason)
    weights = refitted.without(zeros)  # removed blocks take no new values
    return replace(planned, weights=weights or None, not_refitted=not_refitted_message(not_refitted))


def plan_removal(measurement: Measurement, limit: int, kept: Mapping[str, int], removed_blocks: Sequence[int]) -> ShrinkPlan:
    """Plans the removal of units and blocks, as tried on the meta device.

    Args:
        measurement: Losses of the variants.
        limit: Largest allowed cost; above it, a ValueError is raised.
        kept: Number of kept units by module, 0 if its block is removed.
        removed_blocks: Numbers of the blocks to remove.
    """
    scope, numbers, levels = measurement.scope, UnitNumbers(), dict(kept)
    search, target = scope.search, scope.target
    for group in uniform_groups(scope.modules, scope.uniform):  # modules of removed blocks match the kept ones in the config
        number = max(kept[module.name] for module in group) or group[0].count
        levels |= {module.name: number for module in group if not kept[module.name]}
    for module in scope.modules:
        numbers |= removed_units(module, search.units, measurement.scores, levels[module.name])
    by_expert = of_ranks(measurement.orders, numbers)
    cut = find_cut(search.model, search.structure, search.units, numbers, by_expert=by_expert)
    costs, blocks = search.costs(cut), None
    remaining = int(getattr(costs[1], target))
    if removed_blocks:
        smaller = try_removal(search.model, cut)
        stack = scope.blocks.stack
        blocks = find_block_plan(smaller, {stack: removed_blocks}, names=[stack])
        remaining = int(cost_of(without_blocks(smaller, blocks), target) or 0)
    if remaining > limit:
        raise ValueError(
            f"{target}: the plan leaves {remaining:,}, more than the limit {limit:,}, because costs per unit differ. Try another "
            "budget."
        )
    automatic = search.amount.round_to == "auto"
    widths = width_notes(cut, {name: left[0] for name, left in cut.after.items()}) if automatic else []
    kinds = Counter(kind for kind, _ in widths)  # a note for kinds with a common width in all pruned layers
    return ShrinkPlan(UnitPlan.of(cut, costs, tuple(note for kind, note in widths if kinds[kind] == 1)), blocks)


@contextmanager
def simulated(model: PreTrainedModel, planned: ShrinkPlan) -> Iterator[None]:
    """Runs the model as if a plan had been applied, within a `with` block."""
    with ExitStack() as stack:
        values, names = LazyTensors.of(planned.weights or {}), {parameter: name for name, parameter in model.named_parameters()}
        for cut in planned.plans:
            by_expert = cut.by_expert if isinstance(cut, UnitPlan) else {}
            if units := {name: numbers for name, numbers in cut.units.items() if name not in by_expert}:
                stack.enter_context(mask(model, units, dict.fromkeys(cut.kinds.values())))
            for weight, dim, index in consumer_columns(model, planned.units.all_units, by_expert, by_expert):
                value = values.get(names[weight], weight.detach())
                values |= {names[weight]: value.scatter(dim, index, 0)}
        stack.enter_context(store_of(model).computing_with(values))
        yield


def apply_plans(
    model: nn.Module, plans: Iterable[ShapePlan], optimizers: Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Applies plans in order, all or none. See `apply`."""
    check_changeable(model)
    subject, follows = find_transformer(model), []
    undone = store_of(subject).restored_on_error(), restored_on_error(model)
    with torch.inference_mode(mode=False), with_weights(subject, without_inference_tensors(weights)), undone[0], undone[1]:
        for shape_plan in plans:
            follows.append(shape_plan.change(model))
        change_blockwise(subject, {})  # blocks of which no plan has cut anything keep their new values, too
    trained_by = list(optimizers)
    for follow in follows:
        follow(trained_by)
