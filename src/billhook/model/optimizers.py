"""Optimizers that can follow when parameters are replaced: those that reach them through their param groups alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

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
        if (place := _beside_groups(optimizer)) is not None:
            raise ValueError(
                f"{name}: {kind} holds parameters in `{place}` as well as in its param_groups, where new ones do not replace "
                f"them, so that they would not be trained: {INSTEAD}"
            )
    for own, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name}: {own} has hooks that step an optimizer, or do something else, as soon as its gradient is there, and a "
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
    seen, own = {id(one) for one in followed}, {id(parameter) for group in groups for parameter in group["params"]}
    left = list(vars(optimizer).items())
    while left:
        place, held = left.pop()
        if id(held) in own:
            return place
        if id(held) in seen or isinstance(held, Tensor | str):
            continue
        seen.add(id(held))
        if isinstance(held, Optimizer):  # around this one, such as Lightning's, it has the same groups and state
            if id(held.state) not in seen or any(id(group["params"]) not in seen for group in held.param_groups):
                return place
            left += [(place, one) for one in vars(held).values()]
        elif isinstance(held, Mapping):
            left += [(place, one) for pair in held.items() for one in pair]
        elif isinstance(held, list | tuple | set | frozenset):
            left += [(place, one) for one in held]
    return None
