"""Finds which linears add to one and the same stream, in one run of the model.

The output of a linear may first of all be added to something else, after no more than a dropout that is off or a cast; and that
may be the very sum that contains another linear's output, as in a residual stream.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from typing_extensions import Self

ADD: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
SAME: frozenset[Any] = frozenset({dropout, torch.dropout, Tensor.to, Tensor.contiguous})


@dataclass(frozen=True)
class Linears:
    """How often each linear is called in one run; where its output is added to something, the one added there last, if known."""

    calls: dict[str, int]
    before: dict[str, str | None]


def seen(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> Linears:
    """Runs a model once, without gradients, and records its linears."""
    found = Linears(dict.fromkeys(linears, 0), {})

    def mark(name: str, _: nn.Module, __: object, output: object) -> object:
        found.calls[name] += 1
        if not isinstance(output, Tensor):  # a router may be a linear that returns what it has chosen, too
            return output
        return _Marked.of(output, found.before, linear=name)

    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(mark, name)).remove)
        run()
    return found


def agreed(shown: Sequence[Linears]) -> Linears:
    """Combines the facts of runs, one at least; where they differ about what was added before, that is not known."""
    before = {
        name: last
        for name, last in shown[0].before.items()
        if all(name in run.before and run.before[name] == last for run in shown)
    }
    return Linears({name: max(run.calls[name] for run in shown) for name in shown[0].calls}, before)


def followed(shown: Linears, wanted: set[str]) -> dict[str, str | None]:
    """Orders linears that add to one sum in turn, with those between them: each is followed by the one that added there before.

    Linears before the first wanted one compute as ever and are left out, and so are those that have a sum to themselves: nothing
    that others have lost can be made up for there.
    """
    known = {name: last for name, last in shown.before.items() if shown.calls[name] == 1}
    found: dict[str, str | None] = {}
    for name in wanted & known.keys():
        path = [name]
        while (last := known.get(path[-1])) is not None and last in known and last not in path:
            path.append(last)
        while path[-1] not in wanted:
            path.pop()
        found |= dict(zip(path, [*path[1:], None], strict=True)) if len(path) > 1 else {}
    return found


class _Marked(Tensor):
    """The output of a linear, or a sum that contains it; results computed from it are plain tensors, except for the next sum."""

    before: dict[str, str | None]
    linear: str | None
    total: str | None

    @classmethod
    def of(cls, tensor: Tensor, before: dict[str, str | None], linear: str | None = None, total: str | None = None) -> Self:
        marked = tensor.as_subclass(cls)
        marked.before, marked.linear, marked.total = before, linear, total
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            result = result.as_subclass(Tensor)
        if func in SAME and isinstance(args[0], cls):
            return cls.of(result, args[0].before, args[0].linear, args[0].total)
        if func in ADD and not kwargs and len(args) == 2:
            own, other = args if isinstance(args[0], cls) and args[0].linear else reversed(args)
            if isinstance(own, cls) and own.linear and isinstance(other, Tensor) and other.shape == own.shape:
                own.before[own.linear] = other.total if isinstance(other, cls) else None
                return cls.of(result, own.before, total=own.linear)
        return result
