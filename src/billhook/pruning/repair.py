"""Repairs a plan: refits linear layers to compensate for removed units or blocks."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import SINGLE_PROCESS, Comm, LazyTensors, ModulesByName, Reduce, Run, cpu_by_default, run_with_loss, store_of
from billhook.model import (
    ModelPlan,
    Weights,
    check_stored,
    check_values,
    find_transformer,
    is_adapter,
    is_linear,
    size_of,
    stacks_of,
)
from billhook.progress import OnProgress
from billhook.pruning.block_plan import BlockPlan, block_writers, why_not_zeros, writers_behind, zero_weights
from billhook.pruning.expert_repair import repair_experts
from billhook.pruning.plan import UnitPlan
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.repairs.residuals import NoRepair, not_refitted_message, strip_argument
from billhook.tracing.trace import trace
from billhook.units import units_of

RepairOption = RepairConfig | Literal["auto"] | None
"""Repair settings: explicit, `"auto"` (repairs if there are enough tokens), or None (off)."""


def repair_if_requested(
    model: nn.Module,
    plan: ModelPlan,
    batches: Batches,
    repair: RepairOption,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> tuple[Weights | None, str]:
    """Returns repaired weights for a plan, if repair is requested and possible.

    `"auto"` skips the repair if it is not possible. The plan must match the unchanged model.

    Returns:
        The new values, and a note on layers that were not refitted; empty if there are none.
    """
    if repair is None:
        return None, ""
    not_repaired = list[str]()
    try:
        weights = _repaired(model, plan, batches, None if repair == "auto" else repair, comm, progress, not_repaired)
    except NoRepair as error:
        if repair != "auto":
            raise
        return None, f"not repaired: {strip_argument(error)}"
    return weights, not_refitted_message(not_repaired)


@cpu_by_default()
def repair(
    model: nn.Module,
    plan: ModelPlan,
    batches: Batches,
    how: RepairConfig | None = None,
    reduce: Reduce | None = None,
    progress: OnProgress | None = None,
) -> Weights:
    """Returns least-squares weights that compensate for the units or blocks a plan removes.

    Each consumer layer of removed units, or output layer of a block behind a removed one, is refitted in turn, on its inputs
    after all earlier layers were pruned and refitted. The model is not changed; pass the result to `apply`.

    Args:
        model: The model that the plan was made for, unchanged since.
        plan: A plan of units or blocks.
        batches: Calibration data: at least two batches (dictionaries of forward inputs) or a `Calibration`. Use a few times as
            many tokens as an MLP has channels. Padding (`attention_mask`) is ignored.
        how: Repair settings. Defaults to `RepairConfig()`.
        reduce: Sums a tensor over ranks, if each rank has its own batches.
        progress: Callback with the number of refitted layers and the total.

    Returns:
        New parameter values by name; for layers with LoRA, of the base layer.

    Raises:
        ValueError: If the plan was made for another model, no linear layer consumes the removed units, or there are too few
            batches or tokens.

    Example:
        >>> import torch, billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
        >>> batches = [{"input_ids": torch.randint(2048, (4, 128))} for _ in range(2)]
        >>> weights = bh.repair(model, plan, batches)
        >>> bh.apply(model, plan, weights=weights)
    """
    check_types(repair, locals())
    plan.check_made_for(model)
    return _repaired(model, plan, batches, how, Comm.of(reduce, model), progress, [])


def _repaired(
    model: nn.Module,
    plan: ModelPlan,
    batches: Batches,
    repair: RepairConfig | None,
    comm: Comm,
    progress: OnProgress | None,
    not_repaired: list[str],
) -> LazyTensors:
    """Refits consumer layers of units, or output layers of blocks behind removed ones."""
    if isinstance(plan, UnitPlan):
        return repair_with(model, plan, batches, repair, comm, progress=progress, not_repaired=not_repaired)
    if not isinstance(plan, BlockPlan):
        raise ValueError(f"plan: repair supports plans of units and of blocks, got a plan of {plan.kind}")
    try:
        store_of(model).check_writes_values()
    except ValueError as error:
        raise NoRepair(f"{error}") from error
    check_values(model, streamed=True)
    subject = find_transformer(model)
    units, removed, behind = units_of(subject, trace(subject), ["head", "channel"]), [], []
    for stack, numbers in plan.units.items():
        writers = block_writers(subject, stack, units)
        removed += [name for number in numbers for name in writers[number]]
        behind += writers_behind(writers, numbers)
    if why := why_not_zeros(subject, plan.units, removed):
        raise NoRepair(f"repair: {why}")
    if not behind:
        raise NoRepair("repair: no linear layer runs after the removed blocks, so none can compensate for them")
    modules = {name: subject.get_submodule(name) for name in behind}
    kept = {_stored(subject, name): torch.ones(size_of(layer)[1], dtype=torch.bool) for name, layer in modules.items()}
    zeros = zero_weights(subject, [_stored(subject, name) for name in removed])
    weights = repair_linears(subject, kept, _runs(subject, modules, batches), repair, comm, zeros, progress, not_repaired)
    removed_blocks = tuple(f"{stack}.{number}." for stack, numbers in plan.units.items() for number in numbers)
    return weights.without([name for name in weights if name.startswith(removed_blocks)])


def _runs(model: nn.Module, modules: ModulesByName, batches: Batches) -> list[Run]:
    """Returns runs with the non-padding tokens of some layers, named by their base layers."""
    stored, runs = {name: _stored(model, name) for name in modules}, []
    for batch in read_batches(batches, model):
        run = batch if isinstance(batch, Run) else run_with_loss(model, modules, batch)
        runs.append(replace(run, tokens={stored.get(name, name): mask for name, mask in run.tokens.items()}))
    return runs


def repair_with(
    model: nn.Module,
    plan: UnitPlan,
    batches: Batches,
    repair: RepairConfig | None,
    comm: Comm = SINGLE_PROCESS,
    new_params: LazyTensors | None = None,
    also: Collection[str] = (),
    progress: OnProgress | None = None,
    not_repaired: list[str] | None = None,
) -> LazyTensors:
    """Refits consumer layers as `repair` does, while other layers have new parameters.

    The plan must match the unchanged model.

    Args:
        model: The model.
        plan: Plan of the units to remove.
        batches: Batches to fit to.
        repair: Repair settings.
        comm: Communication between ranks.
        new_params: New parameters of other layers. They are not refitted, unless named in `also`.
        also: Layers to refit even if the plan keeps all of their inputs.
        progress: Callback with the number of refitted layers and the total.
        not_repaired: Filled with the names of layers that too few tokens reach.
    """
    check_values(model, streamed=True)
    check_stored(model)
    subject, fixed = find_transformer(model), new_params.modules if new_params is not None else {}
    kept_inputs = {reader: torch.ones(size_of(subject.get_submodule(reader))[1], dtype=torch.bool) for reader in also}
    for name, removed in plan.units.items():
        layer = plan.all_units[name]
        for reader in layer.own_readers if layer.kind in ("head", "channel") else ():
            if is_linear(subject.get_submodule(_stored(subject, reader))) and (reader not in fixed or reader in also):
                is_kept = torch.from_numpy(~np.isin(layer.index, removed))
                kept_inputs[reader] = kept_inputs[reader] & is_kept if reader in kept_inputs else is_kept
    lose = any(plan.all_units[name].of_experts or plan.kinds[name] == "expert" for name in plan.units)
    modules = mixtures = {name: module for name, module in subject.named_modules() if lose and stacks_of(module)}
    if not kept_inputs and not mixtures:
        raise NoRepair("repair: no linear layer consumes the removed units, so none can compensate for them")
    if mixtures and not store_of(subject).holds_all:
        raise NoRepair("repair: experts of a streamed or sharded model cannot be refitted. Load the model into memory.")
    for layer in plan.all_units.values():
        modules = modules | {reader: subject.get_submodule(reader) for reader in layer.own_readers}
    keep = {}
    for reader, is_kept in kept_inputs.items():
        modules[reader], keep[_stored(subject, reader)] = subject.get_submodule(reader), is_kept
    runs = _runs(subject, modules, batches)
    if not mixtures:
        return repair_linears(subject, keep, runs, repair, comm, new_params or None, progress, not_repaired)
    repair, weights = repair or RepairConfig(), new_params or LazyTensors({})
    if keep:
        weights |= repair_linears(subject, keep, runs, replace(repair, match=None), comm, new_params, progress, not_repaired)
    return weights | repair_experts(subject, plan, runs, repair, comm, weights, progress)


def _stored(model: nn.Module, reader: str) -> str:
    """Returns the name of the layer with the weight: beneath LoRA, the base layer."""
    return f"{reader}.base_layer" if is_adapter(model.get_submodule(reader)) else reader
