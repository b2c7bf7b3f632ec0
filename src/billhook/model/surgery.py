"""New parameters instead of old ones, in a model and in the optimizers that train it, if these can follow."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from billhook.engine.sharding import full_tensor, local, reshard, sharded_as
from billhook.engine.state import fresh_autocast_cache, uninterrupted
from billhook.engine.store import store_of
from billhook.model.config_fields import configs_of

INSTEAD = "use a plain optimizer, such as torch.optim.AdamW, or prune or convert first and train the result"


def check_replaceable(model: nn.Module, optimizers: Iterable[Optimizer], name: str = "optimizers") -> None:
    """Refuses optimizers that would go on with the old parameters where new ones take their place.

    Raises:
        ValueError: Of an optimizer that holds parameters in more places than its `param_groups`, as one around another optimizer
            does, and of parameters that have optimizers of their own, which step while gradients are computed.
    """
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if "ZeroRedundancyOptimizer" in {parent.__name__ for parent in type(optimizer).mro()}:  # slow to import
            raise ValueError(f"{name}: {kind} steps shards of its own, which new parameters do not reach: {INSTEAD}")
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"{name}: {kind} keeps directions of all parameters as one vector of a fixed size: {INSTEAD}")
        if (attr := _beside_groups(optimizer)) is not None:
            raise ValueError(
                f"{name}: {kind} holds parameters in `{attr}` as well as in its param_groups, where new ones do not replace "
                f"them, so that they would not be trained: {INSTEAD}"
            )
    for of, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name}: {of} has hooks that step an optimizer, or do something else, as soon as its gradient is there, and a "
                f"new parameter in its place has none: {INSTEAD}"
            )


def check_unhooked(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses parameters with hooks on their gradients, which those in their place would not have."""
    for name, parameter in parameters.items():
        if getattr(parameter, "_backward_hooks", None):
            raise ValueError(
                f"{name} has a hook on its gradient (register_hook), and a new parameter in its place has none: remove the hook, "
                "and register it again afterwards"
            )


def _beside_groups(optimizer: Optimizer) -> str | None:
    """Returns the attribute in which an optimizer holds parameters, or another optimizer of them, beside its groups and state."""
    groups = optimizer.param_groups
    followed: list[Any] = [groups, optimizer.state, *groups, *(group["params"] for group in groups)]
    seen, parameters = set(map(id, followed)), {id(parameter) for group in groups for parameter in group["params"]}
    left = list(vars(optimizer).items())
    while left:
        attr, value = left.pop()
        if id(value) in parameters:
            return attr
        if id(value) in seen or isinstance(value, Tensor | str):
            continue
        seen.add(id(value))
        inside: Iterable[Any] = ()
        if isinstance(value, Optimizer):  # around this one, such as Lightning's, it has the same groups and state
            if not seen.issuperset(map(id, [value.state, *(group["params"] for group in value.param_groups)])):
                return attr
            inside = vars(value).values()
        elif isinstance(value, Mapping):
            inside = chain.from_iterable(value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            inside = value
        left += [(attr, item) for item in inside]
    return None


TABLES = ("_parameters", "_buffers", "_modules")
"""What a module holds, by the names of its attributes."""


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
class Swap:
    """A parameter that has taken the place of another in a model, whose optimizers have yet to follow."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    change: Change


UpdateOptimizers = Callable[[Iterable[Optimizer]], None]
"""Has optimizers follow what has changed in a model; nothing undoes it, so it comes last."""


def replace_parameters(model: nn.Module, changes: Mapping[str, Change], optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Changes parameters by name, everywhere at once: model, param groups, optimizer state, gradients.

    An error, such as a ValueError where new values are not finite and the old were, leaves model and optimizers as they were.
    Order in the param groups stays, so optimizer state in a checkpoint still finds its parameter. A parameter under several
    names (tied) changes under all of them.
    """
    update_optimizers(change_values(model, changes), [optimizers] if isinstance(optimizers, Optimizer) else optimizers)


@torch.no_grad()
def change_values(model: nn.Module, changes: Mapping[str, Change], keep_on_device: bool = False) -> list[Swap]:
    """Changes parameters by name in a model alone, one after the other; `follow` has optimizers follow them.

    The old values leave the device for the CPU, where they wait for what may undo the change: it is `snapshot` that takes them
    home. They stay where something else still holds them on the device.
    """
    check_unhooked({name: model.get_parameter(name) for name in changes})
    with restored_on_error(model):
        return [_changed(model, name, change, keep_on_device) for name, change in changes.items()]


def _changed(model: nn.Module, name: str, change: Change, keep_on_device: bool) -> Swap:
    old = model.get_parameter(name)
    values = change.weight(old.detach())
    if not values.is_meta and not torch.isfinite(values).all() and torch.isfinite(old).all():
        raise ValueError(f"{name}: the new values are not finite")
    new = nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if old.grad is not None and change.gradient is not None:
        new.grad = change.gradient(old.grad).to(new.dtype).contiguous()
    for module in model.modules():
        for attr in [attr for attr, parameter in module._parameters.items() if parameter is old]:
            setattr(module, attr, new)
    if not keep_on_device and not old.is_meta:
        _move(old, torch.device("cpu"))
    return Swap(name, old, new, change)


def _move(parameter: nn.Parameter, device: torch.device) -> None:
    """Moves a parameter that stays the same object, and its gradient."""
    if parameter.device == device:
        return
    with uninterrupted():
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.to(device)
        if gradient is not None:
            parameter.grad = gradient.to(device)


@torch.no_grad()
def update_optimizers(swaps: list[Swap], optimizers: Iterable[Optimizer]) -> None:
    """Gives optimizers the parameters that have taken the place of theirs, whose state follows, and goes, before the next.

    Where state cannot follow, the optimizer restarts for the parameter, with a warning: the model has changed by now, and
    optimizers must not be left behind. For the same reason, an interrupt from the keyboard waits until all have followed.
    """
    trained_by = list(optimizers)
    with uninterrupted():
        while swaps:
            swap = swaps.pop(0)  # with which the old values go
            for optimizer in trained_by:
                _follow(optimizer, swap)


def _follow(optimizer: Optimizer, swap: Swap) -> None:
    state = initial_state(optimizer, swap.new) if swap.change.state is None else _new_state(optimizer, swap, swap.change.state)
    for group in optimizer.param_groups:
        group["params"][:] = [swap.new if parameter is swap.old else parameter for parameter in group["params"]]
    if optimizer.state.pop(swap.old, None) is not None and state:
        optimizer.state[swap.new] = state


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Puts back modules and configs, but not the values of tensors, if an error is raised within."""
    back = snapshot(model)
    try:
        yield
    except BaseException:
        back()
        raise


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Returns what puts modules and configs, but not the values of tensors, back to what they are now."""
    modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
    tables = [*map(vars, configs_of(model)), *(attributes.get(name) for *_, attributes in modules for name in TABLES)]
    contents = [(table, dict(table)) for table in tables if isinstance(table, dict)]  # TorchScript has others
    devices = {parameter: parameter.device for parameter in model.parameters()}

    def back() -> None:
        with uninterrupted():
            for parameter, device in devices.items():
                _move(parameter, device)
            for module, kind, attributes in modules:
                module.__class__ = kind  # FSDP2, masked LoRA and linears that hand out heads have changed it
                _refill(vars(module), attributes)
            for table, before in contents:
                _refill(table, before)

    return back


def _refill(table: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(before)


@contextmanager
def values_restored_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts back what stood in some tensors, which change within, if an error is raised; for that long the CPU has it, too."""
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    with fresh_autocast_cache():
        try:
            yield
        except BaseException:
            with uninterrupted():
                for tensor, values in kept:
                    tensor.data.copy_(values)
            raise


def initial_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, object]:
    """Returns the initial optimizer state of a parameter: empty, except for Adagrad."""
    if not isinstance(optimizer, Adagrad):
        return {}
    first, fused = optimizer.defaults["initial_accumulator_value"], optimizer.defaults["fused"]
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    return {"step": step, "sum": torch.full_like(parameter.detach(), first, memory_format=torch.preserve_format)}


def _new_state(optimizer: Optimizer, swap: Swap, change: Callable[[str, Tensor], Tensor]) -> dict[str, object]:
    """Returns what an optimizer keeps of a parameter, as it is of the one in its place."""
    state, size, what = dict[str, object](), swap.old.shape, ""
    before = optimizer.state.get(swap.old, {})
    for key, value in before.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != size:
            what = f"'{key}' of size {tuple(value.shape)} for {swap.name} of size {tuple(size)}; it cannot follow"
            break
    for key, value in before.items() if not what else ():
        follows = isinstance(value, Tensor) and value.shape == size
        try:
            state[key] = sharded_as(change(key, full_tensor(value)).contiguous(), value) if follows else value
        except Exception as error:  # whatever a change raises
            what = f"'{key}' of {swap.name}, which does not follow ({type(error).__name__}: {error})"
            break
    if not what:
        return state
    warnings.warn(f"{type(optimizer).__name__} keeps {what}, so the optimizer restarts for this parameter", stacklevel=2)
    return initial_state(optimizer, swap.new)


@torch.no_grad()
def assign_values(model: nn.Module, weights: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Takes other values of the same sizes, in place or not at all; the optimizer state of what differs restarts.

    Where parameters are sharded, each rank takes its part of values that all have; those that change are gathered to tell.
    """
    reshard(model)
    trained_by = list(optimizers)
    for name, values in weights.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: the new values are not finite")
    new = {name: model.get_parameter(name) for name in changed_names(model, weights)}
    with values_restored_on_error(new.values()):
        for name, parameter in new.items():
            local(parameter).copy_(local(sharded_as(weights[name], parameter)))
    with uninterrupted():
        for optimizer, parameter in product(trained_by, new.values()):
            if optimizer.state.pop(parameter, None) is not None and (first := initial_state(optimizer, parameter)):
                optimizer.state[parameter] = first


def changed_names(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of parameters that are to have other values than they have, in the model's order."""
    store, names = store_of(model), list[str]()
    for name in (name for name, _ in model.named_parameters(remove_duplicate=False) if name in weights):
        store.load(model.get_submodule(name.rpartition(".")[0]))
        if not torch.equal(full_tensor(model.get_parameter(name)), weights[name]):
            names.append(name)
    return names


def change_blockwise(
    model: nn.Module,
    changes: Mapping[str, Change],
    key: str = "",
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    more: Callable[[], str] = str,
) -> list[Swap]:
    """Changes parameters, block by block where blocks come and go, and returns what optimizers have to follow.

    See `change_values`. Blocks that an earlier process has changed are as it has left them.

    Args:
        model: The model.
        changes: How parameters change, by name.
        key: What tells this change from all others; see `BlockStore.step`.
        sizes: Those of all parameters afterwards, where there are such blocks.
        more: The rest of the key.
    """
    store, swaps, inside = store_of(model), list[Swap](), dict[nn.Module | None, dict[str, Change]]()
    for name, change in changes.items():
        inside.setdefault(store.block_of(name), {})[name] = change
    with store.step(key, more):
        for block in store.blocks.values():
            if (block not in inside and not store.is_altered(block)) or store.resume_block(block, sizes or {}):
                continue
            store.load(block)
            swapped = change_values(model, inside.get(block, {}), keep_on_device=True)  # where they go with their block
            store.change(block)
            store.release()
            swaps += swapped if store.trains else []
    return swaps + change_values(model, inside.get(None, {}))


def snapshot_with_store(model: nn.Module) -> Callable[[], None]:
    """Returns what puts a model back to what it is now, as `snapshot` does, and has its blocks come as now."""
    ways = snapshot(model), store_of(model).snapshot()

    def back() -> None:
        for way in ways:
            way()

    return back
