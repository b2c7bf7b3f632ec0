"""The numbers that a forward computes with, as its code takes them from the config or from attributes of modules."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from billhook.engine.state import undisturbed
from billhook.engine.trees import tree_leaves
from billhook.model.runs.answers import small_inputs

Operands = list[tuple[str, tuple[float, ...]]]
"""The name of each op, in the order of calls, and the single numbers among its arguments."""


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the single numbers that ops are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Operands = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - what an op returns
        leaves = tree_leaves([args, dict(kwargs or {})])
        given = [one.item() if _is_single(one) else one for one in leaves]
        numbers = tuple(one for one in given if isinstance(one, int | float))
        self.seen.append((str(func), numbers))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # code that asks for a value
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


def _is_single(one: object) -> bool:
    """Says whether a tensor is a single number whose value is known."""
    return isinstance(one, torch.Tensor) and not one.is_meta and one.numel() == 1


def operands_of(model: PreTrainedModel) -> Operands | None:
    """Returns the numbers that a model, also one on meta tensors, computes with; None if it does not run."""
    numbers = _Numbers()
    try:
        with undisturbed(model), numbers:
            model(**small_inputs(model))
    except Exception:  # whatever a model raises
        return None
    return numbers.seen
