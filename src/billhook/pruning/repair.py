"""Repairs a plan of units: the linears that read them are refitted, so that they make up for what is removed."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.batches import Run, run_with_loss
from billhook.engine.comm import SINGLE_PROCESS, Comm, Reduce
from billhook.engine.lazy import LazyTensors
from billhook.model.find import check_stored, check_values, find_transformer
from billhook.model.layers import is_adapter, is_linear, size_of
from billhook.model.plan import ModelPlan, Weights
from billhook.progress import OnProgress
from billhook.pruning.plan import UnitPlan
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.repairs.residuals import NoRepair, not_refitted_message, strip_argument

RepairOption = RepairConfig | Literal["auto"] | None
"""How linears are refitted: as told, as far as they can be, or not at all."""


def repair_if_requested(
    model: nn.Module,
    plan: ModelPlan,
    batches: Batches,
    how: RepairOption,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> tuple[Weights | None, str]:
    """Refits as `repair` does where that is asked, or `"auto"`, where it can be, for a plan of the model as it is.

    Returns:
        The new values, and what was not refitted and why; empty if all was, or nothing was asked.
    """
    if how is None:
        return None, ""
    left = list[str]()
    config = how if isinstance(how, RepairConfig) else None
    try:
        new = repair_with(model, _unit_plan(plan), batches, config, comm, progress=progress, not_repaired=left)
    except NoRepair as error:
        if config is not None:
            raise
        return None, f"not repaired: {strip_argument(error)}"
    return new, not_refitted_message(left)


def repair(
    model: nn.Module,
    plan: ModelPlan,
    batches: Batches,
    how: RepairConfig | None = None,
    reduce: Reduce | None = None,
    progress: OnProgress | None = None,
) -> Weights:
    """Refits the linears that read the heads and channels of a plan, so that they make up for what is removed; for `apply`.

    Each is refitted by least squares, one after the other, on its inputs when all before it have been cut and refitted. The model
    stays as it is.

    Args:
        model: The model that the plan was made for, as it is now.
        plan: A plan of units.
        batches: Two at least, as dictionaries of inputs of the model's forward; a few times as many tokens as a feed-forward has
            channels; or a `Calibration` that reads them. Padding (by `attention_mask`) does not count.
        how: How they are refitted; `RepairConfig()` by default.
        reduce: Sums a tensor over ranks, if each has batches of its own.
        progress: Is called with how many linears are refitted, and how many will be.

    Returns:
        New values of parameters, by the parameter's name; of adapted linears, those of the layer beneath the adapters.

    Raises:
        ValueError: If the plan was not made for this model, no linear reads what is removed, or there are too few batches or
            tokens.

    Example:
        >>> import torch, billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
        >>> batches = [{"input_ids": torch.randint(2048, (4, 128))} for _ in range(2)]
        >>> weights = bh.repair(model, plan, batches)
        >>> bh.apply(model, plan, weights=weights)
    """
    check_types(repair, locals())
    unit_plan = _unit_plan(plan)
    unit_plan.check_made_for(model)
    return repair_with(model, unit_plan, batches, how, Comm.of(reduce, model), progress=progress)


def _unit_plan(plan: ModelPlan) -> UnitPlan:
    if not isinstance(plan, UnitPlan):
        raise ValueError(f"plan: repair makes up for units, and this is a plan of {plan.kind}")
    return plan


def repair_with(
    model: nn.Module,
    plan: UnitPlan,
    batches: Batches,
    how: RepairConfig | None = None,
    comm: Comm = SINGLE_PROCESS,
    new_params: LazyTensors | None = None,
    also: Collection[str] = (),
    progress: OnProgress | None = None,
    not_repaired: list[str] | None = None,
) -> LazyTensors:
    """Refits as `repair` does, where linears have other parameters besides; more of them make up for that, though they keep all.

    The plan is one of the model as it is.

    Args:
        model: The model.
        plan: The units that are removed.
        batches: Batches to fit to.
        how: How linears are refitted.
        comm: The ranks.
        new_params: Other parameters of linears; these are not refitted, unless they are named in `also`.
        also: Linears that are refitted also where the plan leaves them all of their inputs.
        progress: Is called with how many linears are refitted.
        not_repaired: Is given the names of linears that are not refitted, as too few tokens come to them.
    """
    check_values(model, coming=True)
    check_stored(model)
    subject, replaced = find_transformer(model), new_params.modules if new_params is not None else {}
    modules = {reader: subject.get_submodule(reader) for layer in plan.all_units.values() for reader in layer.readers}
    stays = {reader: torch.ones(size_of(subject.get_submodule(reader))[1], dtype=torch.bool) for reader in also}
    for name, removed in plan.units.items():
        layer = plan.all_units[name]
        for reader in layer.readers if layer.kind in ("head", "channel") else ():
            if is_linear(subject.get_submodule(_stored(subject, reader))) and (reader not in replaced or reader in also):
                rest = torch.from_numpy(~np.isin(layer.index, removed))
                stays[reader] = stays[reader] & rest if reader in stays else rest
    if not stays:
        raise NoRepair("repair: no linear layer reads what is removed, so none can make up for it")
    stored = {reader: _stored(subject, reader) for reader in stays}
    modules |= {reader: subject.get_submodule(reader) for reader in stays}
    runs = []
    for batch in read_batches(batches, subject):
        run = batch if isinstance(batch, Run) else run_with_loss(subject, modules, batch)
        runs.append(replace(run, tokens={stored.get(reader, reader): mask for reader, mask in run.tokens.items()}))
    keep = {stored[reader]: rest for reader, rest in stays.items()}
    return repair_linears(subject, keep, runs, how, comm, new_params or None, progress, not_repaired)


def _stored(model: nn.Module, reader: str) -> str:
    """Returns the name of the layer that holds a reader's weight: beneath an adapter if it has one."""
    return f"{reader}.base_layer" if is_adapter(model.get_submodule(reader)) else reader
