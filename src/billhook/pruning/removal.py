"""Units are removed: tensors, optimizer state, attributes and config follow, and the outcome is compared with the mask."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.model.config_fields import set_fields
from billhook.model.find import find_transformer
from billhook.model.handed import Indices
from billhook.model.shape import Shape, set_shape, shape_of
from billhook.model.surgery import Change, replace_parameters, undone_by_errors
from billhook.pruning.plan import PLURAL, Cuts, Plan, check_made_for, plan_found
from billhook.pruning.repair import Weights, taken_over
from billhook.pruning.shape_then import shapes_then, sizes_then
from billhook.running.answers import alike, small_inputs, tolerance
from billhook.running.trees import tree_leaves
from billhook.running.undisturbed import resting
from billhook.tracing.coupling import Structure
from billhook.tracing.trace import trace
from billhook.units.channels import find_units
from billhook.units.fields import FieldFinder
from billhook.units.gates import Gate
from billhook.units.units import Units
from billhook.units.zero import _reading, zero_units


def apply(
    plan: Plan,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    weights: Weights | None = None,
) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    What goes of heads and feed-forward channels is first compared with the model in which it is masked: the outcome computes the
    same. Where residual channels or experts go, it must run and have the planned units.

    Args:
        plan: What was made of the model as it is.
        model: The model.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        weights: What `repair` made of the linears that read what goes; by default they keep their weights.

    Raises:
        ValueError: If the plan is not of this model, or the model's code does not follow.
    """
    subject = find_transformer(model)
    if not plan.units:
        return
    structure = trace(subject)
    found = find_units(subject, dict.fromkeys(plan.kinds.values()), structure)
    check_made_for(plan.model, plan.before, subject, found)
    if not _same_cuts(plan.cuts, plan_found(subject, structure, found, plan.units).cuts):
        own = type(subject).__name__
        raise ValueError(f"plan: it was made for a {plan.model} with other units than this {own} has (its tensors hold others)")
    with taken_over(subject, weights):
        carry_out(plan, subject, structure, found, optimizers)


def carry_out(
    plan: Plan,
    subject: PreTrainedModel,
    structure: Structure,
    found: Mapping[str, Units],
    optimizers: Optimizer | Iterable[Optimizer] = (),
    finder: FieldFinder | None = None,
) -> None:
    """What `apply` does, of a plan that has just been made of units that have just been found.

    `finder` is one of the model, or of one like it, that remembers what it has built.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    if not plan.units:
        return
    _check_free(subject, found)
    exact, real = all(found[name].kind in ("head", "channel") for name in plan.units), subject.device.type != "meta"
    readers = {reader for one in found.values() for reader in one.readers if one.kind in ("head", "channel")}
    now, expected = shape_of(subject), _zeroed_answer(subject, found, plan, readers) if exact and real else None
    tensors = sizes_then(subject, plan)
    why = ""
    for shape, fields in shapes_then(subject, structure, plan, now, tensors, finder):
        try:
            with undone_by_errors(subject, optimizers):
                _cut(subject, plan, shape, optimizers)
                set_fields(subject.config, fields)
                if real:
                    _check_answer(subject, readers, expected)
            return
        except _Different as different:
            why = str(different)
    what = " or ".join(dict.fromkeys(PLURAL[plan.kinds[name]] for name in plan.units))
    raise ValueError(
        f"{what}: the code of {type(subject).__name__} does not follow when {what} are removed from its tensors"
        + (f" ({why})" if why else "")
        + ("; they can be masked (mask_heads)" if what == "heads" else "")
    )


class _Different(Exception):
    """The model computes something else than with the units masked, or nothing."""


def _check_answer(model: PreTrainedModel, readers: Iterable[str], expected: list[Tensor] | None) -> None:
    try:
        found = _answer(model, readers)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as a kernel that takes multiples of something
        raise _Different(str(error).partition("\n")[0]) from error
    if expected is not None and not alike(expected, found, tolerance(model)):
        raise _Different


def _cut(model: PreTrainedModel, plan: Plan, shape: Shape, optimizers: list[Optimizer]) -> None:
    names = dict.fromkeys(name for name, _ in plan.cuts)
    parameters = dict(model.named_parameters())
    cuts = {name: partial(_smaller, {d: stays for (own, d), stays in plan.cuts.items() if own == name}) for name in names}
    buffers = {name: cut(model.get_buffer(name)) for name, cut in cuts.items() if name not in parameters}
    changes = {name: Change(cut, partial(_smaller_state, cut), cut) for name, cut in cuts.items() if name in parameters}
    said = list(_sizes_said(model))
    replace_parameters(model, changes, optimizers)
    for module, attr in said:
        setattr(module, attr, type(getattr(module, attr))(module.get_parameter("weight").shape))
    for name, buffer in buffers.items():
        owner, _, attr = name.rpartition(".")
        model.get_submodule(owner)._buffers[attr] = buffer
    set_shape(model, shape)


def _sizes_said(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a module keeps the whole size of its weight, as a norm does."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        for attr, value in vars(module).items():
            if weight is not None and isinstance(value, tuple | list) and tuple(value) == tuple(weight.shape):
                yield module, attr


def _smaller(stays: Mapping[int, Indices], tensor: Tensor) -> Tensor:
    for dim, positions in stays.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor


def _smaller_state(cut: Callable[[Tensor], Tensor], _: str, state: Tensor) -> Tensor:
    return cut(state)


@torch.no_grad()
def _zeroed_answer(model: PreTrainedModel, found: Mapping[str, Units], plan: Plan, readers: Iterable[str]) -> list[Tensor]:
    """What the model gives without some units, whose reading weights are zero for that long."""
    kept = [(weight, dim, at, weight.index_select(dim, at)) for weight, dim, at in _reading(model, found, plan.units)]
    try:
        zero_units(model, found, plan.units)
        return _answer(model, readers)
    finally:
        for weight, dim, at, values in reversed(kept):
            weight.index_copy_(dim, at, values)


@torch.no_grad()
def _answer(model: PreTrainedModel, readers: Iterable[str]) -> list[Tensor]:
    """What the readers of units and the model give for small random inputs."""
    given: list[Any] = []
    modules = [model.get_submodule(reader) for reader in sorted(readers)]
    hooks = [module.register_forward_hook(lambda *told: given.append(told[-1])) for module in modules]
    try:
        with resting(model):
            given.append(model(**small_inputs(model)))
    finally:
        for hook in hooks:
            hook.remove()
    values = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.detach().double().cpu() for value in values]


def _check_free(model: PreTrainedModel, units: Mapping[str, Units]) -> None:
    for name in {reader for one in units.values() for reader in one.readers}:
        if any(isinstance(hook, Gate) for hook in model.get_submodule(name)._forward_pre_hooks.values()):
            raise ValueError(f"units: a mask or gates stand before {name}: remove them first (mask.remove())")


def _same_cuts(one: Cuts, other: Cuts) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(stays, other[place]) for place, stays in one.items())
