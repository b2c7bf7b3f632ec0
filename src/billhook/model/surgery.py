"""New parameters instead of old ones, in a model and in the optimizers that train it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from billhook.model.config_fields import configs_of
from billhook.running.casts import fresh_casts
from billhook.running.sharded.shards import local, reshard, sharded_as, whole
from billhook.running.sharded.turns import turns_of


@dataclass(frozen=True)
class Change:
    """How one parameter changes, and how its optimizer state follows.

    Attributes:
        weight: From the old values to the new.
        state: From an optimizer's state tensor of the old size to the new, by the name that the optimizer gives it
            (`exp_avg`, `momentum_buffer`, ...). State of any other size is dropped, with a warning. None where the state means
            nothing for the new values: then the optimizer restarts for the parameter, its count of steps too.
        gradient: From the old gradient to the new; by default there is none afterwards.
    """

    weight: Callable[[Tensor], Tensor]
    state: Callable[[str, Tensor], Tensor] | None
    gradient: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Swap:
    places: list[tuple[nn.Module, str]]
    old: nn.Parameter
    new: nn.Parameter
    states: list[tuple[Optimizer, dict[str, object]]]


@torch.no_grad()
def replace_parameters(model: nn.Module, changes: Mapping[str, Change], optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Changes parameters by name, everywhere at once: model, param groups, optimizer state, gradients.

    An error, such as a ValueError where new values are not finite and the old were, leaves model and optimizers as they were.
    Order in the param groups stays, so optimizer state in a checkpoint still finds its parameter. A parameter under several
    names (tied) changes under all of them.
    """
    if isinstance(optimizers, Optimizer):
        optimizers = [optimizers]
    trained_by = list(optimizers)
    swaps = [_prepare(model, name, change, trained_by) for name, change in changes.items()]
    with undone_by_errors(model, trained_by):
        for swap in swaps:
            _carry_out(swap)


@torch.no_grad()
def have_followed(
    model: nn.Module, old: Mapping[str, nn.Parameter], changes: Mapping[str, Change], optimizers: Iterable[Optimizer]
) -> None:
    """Gives optimizers parameters that have changed without them; what they keep of each follows, and goes, before the next.

    Args:
        model: The model as it is now.
        old: The parameters that optimizers have, by the names of those that came instead.
        changes: How each has changed.
        optimizers: Those that train the model.
    """
    for name, parameter in old.items():
        for optimizer in optimizers:
            _swap(optimizer, parameter, new := model.get_parameter(name), _state(optimizer, name, parameter, new, changes[name]))


def _carry_out(swap: _Swap) -> None:
    for module, attr in swap.places:
        setattr(module, attr, swap.new)
    for optimizer, state in swap.states:
        _swap(optimizer, swap.old, swap.new, state)


def _swap(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, state: dict[str, object]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        del optimizer.state[old]
        if state:
            optimizer.state[new] = state


@contextmanager
def undone_by_errors(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
    """Puts back modules, configs and optimizers, but not the values of tensors, if an error is raised within."""
    back = way_back(model, optimizers)
    try:
        yield
    except BaseException:
        back()
        raise


def way_back(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Callable[[], None]:
    """Returns what puts modules, configs and optimizers, but not the values of tensors, back to what they are now."""
    tables = ("_parameters", "_buffers", "_modules")
    modules = [(m, type(m), dict(vars(m)), [(vars(m)[t], dict(vars(m)[t])) for t in tables]) for m in model.modules()]
    mappings: list[tuple[Any, Any]] = [(vars(config), dict(vars(config))) for config in configs_of(model)]
    mappings += [(optimizer.state, dict(optimizer.state)) for optimizer in optimizers]
    groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]

    def back() -> None:
        for module, kind, attributes, own in modules:
            module.__class__ = kind
            for now, before in [(vars(module), attributes), *own]:
                now.clear()
                now.update(before)
        for now, before in mappings:
            now.clear()
            now.update(before)
        for group, params in groups:
            group["params"][:] = params

    return back


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts back what stood in some tensors, which change within, if an error is raised; they are held twice for that long."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with fresh_casts():
        try:
            yield
        except BaseException:
            for tensor, values in kept:
                tensor.data.copy_(values)
            raise


def _prepare(model: nn.Module, name: str, change: Change, optimizers: list[Optimizer]) -> _Swap:
    old = model.get_parameter(name)
    values = change.weight(old.detach())
    if not values.is_meta and not torch.isfinite(values).all() and torch.isfinite(old).all():
        raise ValueError(f"{name}: the new values are not finite")
    new = nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if old.grad is not None and change.gradient is not None:
        new.grad = change.gradient(old.grad).to(new.dtype).contiguous()
    places = [(m, attr) for m in model.modules() for attr, p in m._parameters.items() if p is old]
    return _Swap(places, old, new, [(optimizer, _state(optimizer, name, old, new, change)) for optimizer in optimizers])


def _state(optimizer: Optimizer, name: str, old: nn.Parameter, new: nn.Parameter, change: Change) -> dict[str, object]:
    return fresh(optimizer, new) if change.state is None else _new_state(optimizer, name, old, change.state)


def fresh(optimizer: Optimizer, parameter: Tensor) -> dict[str, object]:
    """Returns the initial optimizer state of a parameter: empty, except for Adagrad."""
    if not isinstance(optimizer, Adagrad):
        return {}
    first = optimizer.defaults["initial_accumulator_value"]
    return {"step": torch.tensor(0.0), "sum": torch.full_like(parameter.detach(), first, memory_format=torch.preserve_format)}


def _new_state(optimizer: Optimizer, name: str, old: nn.Parameter, follow: Callable[[str, Tensor], Tensor]) -> dict[str, object]:
    state: dict[str, object] = {}
    for key, value in optimizer.state.get(old, {}).items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = sharded_as(follow(key, whole(value)).contiguous(), value)
        elif isinstance(value, Tensor) and value.ndim > 0:
            warnings.warn(
                f"{type(optimizer).__name__} keeps '{key}' of size {tuple(value.shape)} for {name} of size "
                f"{tuple(old.shape)}; it cannot follow, so the optimizer restarts for this parameter",
                stacklevel=2,
            )
            return {}
        else:
            state[key] = value
    return state


@torch.no_grad()
def take(model: nn.Module, weights: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Takes other values of the same sizes, in place or not at all; the optimizer state of what differs restarts.

    Where parameters are sharded, each rank takes its part of values that all have; those that change are gathered to tell.
    """
    reshard(model)
    trained_by = list(optimizers)
    for name, values in weights.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: the new values are not finite")
    new = {name: model.get_parameter(name) for name in changed(model, weights)}
    with undone_by_errors(model, trained_by), values_kept(new.values()):
        for name, parameter in new.items():
            local(parameter).copy_(local(sharded_as(weights[name], parameter)))
            for optimizer in trained_by:
                if optimizer.state.pop(parameter, None) is not None and (first := fresh(optimizer, parameter)):
                    optimizer.state[parameter] = first


def changed(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of parameters that are to have other values than they have, in the model's order."""
    turns, found = turns_of(model), list[str]()
    for name in (name for name, _ in model.named_parameters(remove_duplicate=False) if name in weights):
        if turns is not None:
            turns.bring(model.get_submodule(name.rpartition(".")[0]))
        if not torch.equal(whole(model.get_parameter(name)), weights[name]):
            found.append(name)
    return found
