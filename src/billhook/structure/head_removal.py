"""Heads are removed: tensors, optimizer state, module attributes and config follow, and the outcome is compared with the mask."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from billhook.resting import resting
from billhook.structure.axes import Indices
from billhook.structure.coupling import Structure
from billhook.structure.gates import Gate, place_mask
from billhook.structure.head_plan import Cuts, HeadPlan, plan_heads
from billhook.structure.head_shape import set_fields, shapes_then, sizes_then
from billhook.structure.heads import Chosen, check_layers, find_heads
from billhook.structure.inputs import make_inputs
from billhook.structure.shape import Shape, find_transformer, set_shape, shape_of
from billhook.structure.surgery import Change, replace_parameters
from billhook.structure.trace import trace
from billhook.structure.units import Per, Units


def prune_heads(
    model: nn.Module,
    heads: Chosen,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    per: Per = "head",
) -> HeadPlan:
    """Removes heads from a model in place: it computes what it did with these heads masked, and is smaller.

    Where the config of the model's class, or of a family that computes the same, can say the new number of heads, plain
    `from_pretrained` loads what `bh.save` writes; otherwise the config says the shape beside it, and `bh.load` loads it.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        heads: The heads that go, by layer: its number (in the order in which the attentions run) or the attention's name.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_heads`, or if the model's code does not follow; then nothing has changed.
    """
    subject = find_transformer(model)
    structure = trace(subject)
    plan = plan_heads(subject, heads, per, structure)
    _carry_out(plan, subject, find_heads(subject, structure), optimizers)
    return plan


def apply_heads(plan: HeadPlan, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Args:
        plan: What `plan_heads` made of the model as it is.
        model: The model.
        optimizers: As in `prune_heads`.

    Raises:
        ValueError: If the plan is not of this model, or the model's code does not follow.
    """
    subject = find_transformer(model)
    if not plan.heads:
        return
    structure = trace(subject)
    heads = find_heads(subject, structure)
    _check_same(plan, subject, heads, structure)
    _carry_out(plan, subject, heads, optimizers)


def _carry_out(
    plan: HeadPlan, subject: PreTrainedModel, heads: Mapping[str, Units], optimizers: Optimizer | Iterable[Optimizer]
) -> None:
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    if not plan.heads:
        return
    _check_free(subject, heads)
    now, expected = shape_of(subject), _masked_answer(subject, heads, plan)
    tensors = sizes_then(subject, plan)
    for shape, fields in shapes_then(subject, plan, now, tensors):
        with _undone_unless_done(subject, now, optimizers):
            _cut(subject, plan, shape, optimizers)
            set_fields(subject, fields)
            if _alike(expected, _answer(subject, heads), _tolerance(subject)):
                return
            raise _Different
    raise ValueError(
        f"heads: the code of {type(subject).__name__} does not follow when heads are removed from its tensors; they can be "
        "masked (mask_heads)"
    )


@torch.no_grad()
def zero_heads(model: nn.Module, heads: Chosen, per: Per = "head") -> None:
    """Makes zero the weights that read some heads, in place: the model computes what it does with them masked, without a mask.

    Args:
        model: As in `prune_heads`.
        heads: The heads, as in `prune_heads`.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Raises:
        ValueError: If there is no such layer or head.
    """
    subject = find_transformer(model)
    found = find_heads(subject)
    for name, numbers in check_layers(found, heads, per).items():
        one = found[name]
        gone = numbers if per == "head" else np.flatnonzero(np.isin(one.kv_of, numbers))
        for member in one.held_by():
            if member.reads:
                positions = torch.from_numpy(np.flatnonzero(np.isin(one.of_member(member), gone)))
                weight = subject.get_parameter(member.name)
                weight.index_fill_(member.dim, positions.to(weight.device), 0)


class _Different(Exception):
    """The model computes something else than with the heads masked."""


def _cut(model: PreTrainedModel, plan: HeadPlan, shape: Shape, optimizers: list[Optimizer]) -> None:
    names = dict.fromkeys(name for name, _ in plan.cuts)
    parameters = dict(model.named_parameters())
    cuts = {name: partial(_smaller, {d: stays for (own, d), stays in plan.cuts.items() if own == name}) for name in names}
    buffers = {name: cut(model.get_buffer(name)) for name, cut in cuts.items() if name not in parameters}
    changes = {name: Change(cut, partial(_smaller_state, cut)) for name, cut in cuts.items() if name in parameters}
    replace_parameters(model, changes, optimizers)
    for name, buffer in buffers.items():
        owner, _, attr = name.rpartition(".")
        model.get_submodule(owner)._buffers[attr] = buffer
    set_shape(model, shape)


def _smaller(stays: Mapping[int, Indices], tensor: Tensor) -> Tensor:
    for dim, positions in stays.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor


def _smaller_state(cut: Callable[[Tensor], Tensor], _: str, state: Tensor) -> Tensor:
    return cut(state)


@contextmanager
def _undone_unless_done(model: PreTrainedModel, now: Shape, optimizers: list[Optimizer]) -> Iterator[None]:
    """Puts back model and optimizers, unless what happens within returns."""
    tensors = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
    states = [(optimizer, dict(optimizer.state)) for optimizer in optimizers]
    configs = [(config, dict(vars(config))) for config in {id(c): c for c in _configs(model)}.values()]
    try:
        yield
    except BaseException as error:
        for module, parameters, buffers in tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for group, params in groups:
            group["params"][:] = params
        for optimizer, state in states:
            optimizer.state.clear()
            optimizer.state.update(state)
        set_shape(model, now)
        for config, fields in configs:
            vars(config).update(fields)
        if not isinstance(error, _Different):
            raise


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    return [model.config, *(c for c in vars(model.config).values() if isinstance(c, PretrainedConfig))]


def _masked_answer(model: PreTrainedModel, heads: Mapping[str, Units], plan: HeadPlan) -> list[Tensor]:
    with place_mask(model, heads, plan.heads):
        return _answer(model, heads)


@torch.no_grad()
def _answer(model: PreTrainedModel, heads: Mapping[str, Units]) -> list[Tensor]:
    """What the attentions and the model give for small random inputs."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in make_inputs(model).items()}
    given: list[Any] = []
    readers = {reader: model.get_submodule(reader) for one in heads.values() for reader in one.readers}
    hooks = [reader.register_forward_hook(lambda *told: given.append(told[-1])) for reader in readers.values()]
    try:
        with resting(model):
            given.append(model(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    values = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.detach().double().cpu() for value in values]


def _alike(expected: list[Tensor], found: list[Tensor], tolerance: float) -> bool:
    """Whether outputs are the same but for rounding."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return False
    return all(_near(a, b, tolerance) for a, b in zip(expected, found, strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)  # also what is not finite
    return bool(torch.where(same, 0, a - b).norm() <= tolerance * a[a.isfinite()].norm())


def _tolerance(model: PreTrainedModel) -> float:
    """How far outputs may be from each other, relative to their norm; parts of most models are in float32 at best."""
    return min(1000 * max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)), 0.05)


def _check_same(plan: HeadPlan, model: PreTrainedModel, heads: Mapping[str, Units], structure: Structure) -> None:
    counts = {name: (one.count(), one.count("kv_head")) for name, one in heads.items()}
    same = plan.model == type(model).__name__ and plan.before == counts
    if not same or not _same_cuts(plan.cuts, plan_heads(model, plan.heads, structure=structure).cuts):
        raise ValueError(f"plan: it was made for a {plan.model} with other heads than this {type(model).__name__} has")


def _check_free(model: PreTrainedModel, heads: Mapping[str, Units]) -> None:
    for name in {reader for one in heads.values() for reader in one.readers}:
        if any(isinstance(hook, Gate) for hook in model.get_submodule(name)._forward_pre_hooks.values()):
            raise ValueError(f"heads: a mask or gates stand before {name}: remove them first (mask.remove())")


def _same_cuts(one: Cuts, other: Cuts) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(stays, other[place]) for place, stays in one.items())
