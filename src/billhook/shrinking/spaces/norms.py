"""Finds weights with which norms of the residual stream make up for spanning fewer of its channels."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.linalg import in_float64
from billhook.pruning.fold import divided
from billhook.units.units import Units


def energies(model: PreTrainedModel, stream: Units, runs: Sequence[Run]) -> dict[str, Tensor]:
    """Measures by norm the share of each channel in the mean square of its inputs, on average: float64, `[channels]`."""
    names = dict.fromkeys(member.name.rpartition(".")[0] for member in stream.members)
    norms = {name: model.get_submodule(name) for name in names}
    norms = {name: one for name, one in norms.items() if {tuple(p.shape) for p in one.parameters()} == {(stream.count(),)}}
    sums = {name: torch.zeros(stream.count(), dtype=torch.float64) for name in norms}

    def note(name: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape[-1:] == sums[name].shape:
            given = args[0].detach().flatten(0, -2)
            given = in_float64(given)
            squares = (given - given.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else given).square()
            sums[name] += (squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).sum(0).cpu()

    with ExitStack() as hooks, undisturbed(model):
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(partial(note, name)).remove)
        for run in runs:
            run.visit()
    return {name: own / own.sum() for name, own in sums.items() if own.any()}


def scaled_norms(model: PreTrainedModel, shares: Mapping[str, Tensor], gone: Sequence[int]) -> dict[str, Tensor]:
    """Returns weights with which norms give what they did on average though they span fewer channels, in their sizes now.

    A norm divides by the root of a mean over channels, which is that of those that stay afterwards.
    """
    found: dict[str, Tensor] = {}
    for name, own in shares.items():
        stays = torch.ones_like(own)
        stays[list(gone)] = 0
        ratio = 1 / math.sqrt(max(float(own @ stays), 1e-6) * len(own) / float(stays.sum()))
        norm, weight = model.get_submodule(name), f"{name}.weight"
        store_of(model).load(norm)
        scale = partial(torch.div, other=ratio) if isinstance(norm, nn.LayerNorm) else divided(norm, ratio)
        if scale is not None and "weight" in norm._parameters:
            found[weight] = scale(norm.get_parameter("weight").detach())
    return found
