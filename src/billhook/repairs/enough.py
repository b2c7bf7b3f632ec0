"""Refuses batches that give no linear as many tokens as a refit needs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.engine.comm import ALONE, Comm


class NoRepair(ValueError):
    """Raised where no linear can be refitted: none reads what is removed, or batches, or their tokens, are too few."""


def check_tokens(linears: Mapping[str, nn.Module], needed: Mapping[str, int], runs: Sequence[Run], comm: Comm = ALONE) -> None:
    """Refuses batches that give no linear enough tokens that count; runs them until one has enough.

    Args:
        linears: The linears.
        needed: By linear, how many tokens it needs: as many as inputs that it keeps.
        runs: The batches.
        comm: The ranks, each of which has batches of its own.

    Raises:
        NoRepair: If none has enough.
    """
    names, wanted = list(linears), torch.tensor([needed[name] for name in linears])
    given = torch.zeros_like(wanted)

    def count(place: int, run: Run, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        keep = counting(run, names[place], inputs)
        given[place] += inputs.shape[:-1].numel() if keep is None else int(keep.sum())

    for run in runs:
        with ExitStack() as stack:
            for place, linear in enumerate(linears.values()):
                hook = partial(count, place, run)
                stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            run.visit()
        if (given >= wanted).any():
            break
    given = comm(given.to(comm.device)).to(wanted.device)
    if not (given >= wanted).any():
        raise NoRepair(f"{too_few(names[0])}, which is given {int(given[0])} and needs {int(wanted[0])} at least")


def too_few(first: str) -> str:
    """Returns the words for what is refused."""
    return f"batches: too few tokens that count for any refit; the first linear is {first}"


def not_refitted(names: Sequence[str]) -> str:
    """Returns the words for linears that were not refitted; empty if there are none.

    >>> not_refitted(["0.down_proj"])
    'too few tokens have come to 1 linear, which is not refitted: 0.down_proj'
    """
    which = "1 linear, which is" if len(names) == 1 else f"{len(names)} linears, which are"
    return f"too few tokens have come to {which} not refitted: {', '.join(names)}" if names else ""


def without_name(error: ValueError) -> str:
    """Returns what is wrong with batches without the name of the argument, which is another one elsewhere.

    >>> without_name(ValueError("batches: two are needed")), without_name(ValueError("model: another"))
    ('two are needed', 'model: another')
    """
    return str(error).removeprefix("batches: ")


def counting(run: Run, name: str, inputs: Tensor) -> Tensor | None:
    """Finds the tokens of a linear's inputs that count, bool, `[batch, length]`; None if all do."""
    keep = run.tokens.get(name)
    if keep is None or keep.numel() != inputs.shape[:-1].numel():
        return None
    return keep.reshape(inputs.shape[:-1]).to(inputs.device)
