"""Replaces parameters in a model and in its optimizers."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from billhook.engine import fresh_autocast_cache, full_tensor, sharded_as, store_of, uninterrupted
from billhook.model.config_fields import configs_of

INSTEAD = "Use a plain optimizer, such as torch.optim.AdamW, or prune or convert first and train the result."


def check_replaceable(model: nn.Module, optimizers: Iterable[Optimizer], name: str = "optimizers") -> None:
    """Raises for optimizers that would keep training replaced parameters.

    Raises:
        ValueError: If an optimizer holds parameters outside of its `param_groups`, such as a wrapper of another optimizer, or if
            parameters are stepped during the backward pass.
    """
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if "ZeroRedundancyOptimizer" in {parent.__name__ for parent in type(optimizer).mro()}:  # slow to import
            raise ValueError(f"{name}: {kind} trains its own shards, which new parameters do not reach. {INSTEAD}")
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"{name}: {kind} keeps directions of all parameters in vectors of fixed size. {INSTEAD}")
        if (attr := _beside_groups(optimizer)) is not None:
            raise ValueError(
                f"{name}: {kind} also holds parameters in `{attr}`, outside of its param_groups, so new parameters would not be "
                f"trained. {INSTEAD}"
            )
    for of, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name}: {of} has hooks on gradient accumulation, such as an optimizer step in backward, which a new parameter "
                f"would lack. {INSTEAD}"
            )


def check_unhooked(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises for parameters with gradient hooks, which new parameters would lack."""
    for name, parameter in parameters.items():
        if getattr(parameter, "_backward_hooks", None):
            raise ValueError(
                f"{name} has a gradient hook (register_hook), which a new parameter would lack. Remove the hook, and register it "
                "again afterwards."
            )


def _beside_groups(optimizer: Optimizer) -> str | None:
    """Returns an attribute with parameters outside of param_groups and state."""
    groups = optimizer.param_groups
    trained = [group["params"] for group in groups]
    seen, parameters = set(map(id, [groups, optimizer.state, *groups, *trained])), set(map(id, chain.from_iterable(trained)))
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
        left += product([attr], inside)
    return None


@dataclass(frozen=True)
class Change:
    """How a parameter and its optimizer state change.

    Attributes:
        weight: Maps old values to new values.
        state: Maps the name and value of an optimizer state tensor (`exp_avg`, `momentum_buffer`, ...) to its new value. State of
            any other size is dropped with a warning. None restarts the optimizer for the parameter, including its step count.
        gradient: Maps the old gradient to the new gradient. Defaults to None, which drops it.
    """

    weight: Callable[[Tensor], Tensor]
    state: Callable[[str, Tensor], Tensor] | None
    gradient: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Swap:
    """A replaced parameter, whose optimizers are not updated yet."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    change: Change


UpdateOptimizers = Callable[[Iterable[Optimizer]], None]
"""Updates optimizers after a change. It cannot be undone, so it comes last."""


@torch.no_grad()
def change_values(model: nn.Module, changes: Mapping[str, Change], keep_on_device: bool = False) -> list[Swap]:
    """Replaces parameters by name in the model. `update_optimizers` then updates optimizers.

    Old values are moved to the CPU until the change is final, and back if it is undone. Values that are shared elsewhere stay on
    the device.
    """
    check_unhooked({name: model.get_parameter(name) for name in changes})
    with restored_on_error(model):
        return [_changed(model, name, change, keep_on_device) for name, change in changes.items()]


def _changed(model: nn.Module, name: str, change: Change, keep_on_device: bool) -> Swap:
    old = model.get_parameter(name)
    values = change.weight(old.detach())
    if not values.is_meta and not torch.isfinite(values).all() and torch.isfinite(old).all():
        raise ValueError(f"{name}: the new values are not finite.")
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
    """Moves a parameter and its gradient. It stays the same object."""
    if parameter.device == device:
        return
    with uninterrupted():
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.to(device)
        if gradient is not None:
            parameter.grad = gradient.to(device)


@torch.no_grad()
def update_optimizers(swaps: list[Swap], optimizers: Iterable[Optimizer]) -> None:
    """Replaces parameters in optimizers and remaps their state.

    If state cannot be remapped, the optimizer restarts for the parameter with a warning, because the model has already changed.
    For the same reason, keyboard interrupts are delayed to the end.
    """
    trained_by = list(optimizers)
    with uninterrupted():
        while swaps:
            swap = swaps.pop(0)  # frees the old values
            for optimizer in trained_by:
                change = swap.change.state
                state = initial_state(optimizer, swap.new) if change is None else _new_state(optimizer, swap, change)
                for group in optimizer.param_groups:
                    group["params"][:] = [swap.new if parameter is swap.old else parameter for parameter in group["params"]]
                if optimizer.state.pop(swap.old, None) is not None and state:
                    optimizer.state[swap.new] = state


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restores modules and configs, but not tensor values, after an error."""
    back = snapshot(model)
    try:
        yield
    except BaseException:
        back()
        raise


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Returns a function that restores modules and configs, but not tensor values."""
    modules, tables = list[tuple[nn.Module, type[Any], dict[str, Any]]](), list[Any](map(vars, configs_of(model)))
    for module in model.modules():
        modules.append((module, type(module), dict(vars(module))))
        tables += map(vars(module).get, ("_parameters", "_buffers", "_modules"))
    contents = [(table, dict(table)) for table in tables if isinstance(table, dict)]  # TorchScript has others
    devices = {parameter: parameter.device for parameter in model.parameters()}

    def back() -> None:
        with uninterrupted():
            for parameter, device in devices.items():
                _move(parameter, device)
            for module, kind, attributes in modules:
                module.__class__ = kind  # changed by FSDP2 and masked LoRA
                _refill(vars(module), attributes)
            for table, before in contents:
                _refill(table, before)

    return back


def _refill(table: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(before)


@contextmanager
def values_restored_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores tensor values after an error. Meanwhile the CPU holds a copy."""
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
    """Returns the remapped optimizer state of a replaced parameter."""
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


def changed_names(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of parameters whose values would change, in model order."""
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
    """Changes parameters block by block, and returns the swaps for optimizers.

    See `change_values`. Blocks that an earlier process has changed are adopted.

    Args:
        model: The model.
        changes: Changes by parameter name.
        key: Identifies the change. See `BlockStore.step`.
        sizes: Sizes of all parameters afterwards, for streamed models.
        more: Returns the rest of the key.
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
    """Returns a function that restores a model and the store of its blocks."""
    store_back = store_of(model).snapshot()  # first, because it releases the loaded block, whose weights would be kept
    model_back = snapshot(model)

    def back() -> None:
        model_back()
        store_back()

    return back
