"""Weights that make up for the numbers that a class derives from a changed config, so that the model computes what it did."""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.linalg import in_float64
from billhook.model.shapes.numbers import Numbers, take_derived
from billhook.model.surgery import Change, Swap, change_values

Scale = Callable[[Tensor], Tensor]
"""From the old values of a weight to the new."""


def fold(model: PreTrainedModel, numbers: Numbers) -> list[Swap] | str:
    """Gives modules the numbers that their class derives, and scales embeddings so that their outputs stay as they were.

    Where an embedding is tied to the output, the norm before that is scaled back. Their optimizer state restarts. If other
    modules have such numbers, nothing changes, and the reason is returned.
    """
    changes: dict[str, Change] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in numbers):
        own = {name: both for name, both in numbers.items() if name.rpartition(".")[0] == owner}
        scales = _scales(model, owner, own)
        if scales is None:
            name, (before, after) = next(iter(own.items()))
            return f"{name} follows from the config, {before:.4g} now and {after:.4g} then, and no weights make up for that"
        changes |= {name: Change(scale, None) for name, scale in scales.items()}
    take_derived(model, numbers)
    return change_values(model, changes)


def _scales(model: PreTrainedModel, owner: str, numbers: Numbers) -> dict[str, Scale] | None:
    """Finds how weights make up for the numbers of a module, tried on a small copy; None if they do not."""
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Embedding):
        return None
    kind = module.weight.dtype
    named = {name.rpartition(".")[2]: both for name, both in numbers.items()}
    used = [both for name, both in named.items() if name in module._buffers] or list(named.values())
    before, after = (float(torch.tensor(number).to(kind)) for number in used[0])
    ratio, given = before / after, torch.arange(3)
    up = partial(torch.mul, other=ratio)
    if not _alike(_small(module, given, 0, named), _small(module, given, 1, named, up)):
        return None
    scales: dict[str, Scale] = {f"{owner}.weight": up}
    if not any(one is not module and one._parameters.get("weight") is module.weight for one in model.modules()):
        return scales
    name = _last_norm(model, module.embedding_dim)
    back = divided(model.get_submodule(name), ratio) if name else None
    return None if back is None else scales | {f"{name}.weight": back}


def divided(norm: nn.Module, ratio: float) -> Scale | None:
    """Finds how the weight of a norm, its only parameter, divides what it gives, tried on a small copy; None if it does not."""
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(norm.get_parameter("weight").dtype)
    for back in (partial(torch.div, other=ratio), partial(_one_off, by=ratio)):
        if _alike(_small(norm, given, 0, {}) / ratio, _small(norm, given, 1, {}, back)):
            return back
    return None


def _one_off(weight: Tensor, by: float) -> Tensor:
    """Divides what a weight and one are together, as Gemma's norms multiply by that."""
    return (1 + in_float64(weight)).div(by).sub(1).to(weight)


def _last_norm(model: nn.Module, width: int) -> str:
    """Finds the last module whose only parameter is a weight as wide as the stream; empty if there is none."""
    found = [
        name
        for name, m in model.named_modules()
        if [(n, tuple(p.shape)) for n, p in m.named_parameters()] == [("weight", (width,))]
    ]
    return found[-1] if found else ""


@torch.no_grad()
def _small(
    module: nn.Module, given: Tensor, place: int, numbers: Mapping[str, tuple[float, float]], scale: Scale | None = None
) -> Tensor:
    """Computes what a narrow copy of a module does, with its numbers before or after, and its weight scaled."""
    small, like = copy.copy(module), module.get_parameter("weight")
    weight = torch.randn((3, 4)[-like.dim() :], generator=torch.Generator().manual_seed(1)).to(like.dtype)
    small._parameters = {"weight": nn.Parameter(weight if scale is None else scale(weight), requires_grad=False)}
    small._buffers = {name: torch.tensor(both[place]) for name, both in numbers.items() if name in module._buffers}
    vars(small).update({name: both[place] for name, both in numbers.items() if name not in module._buffers})
    output: Tensor = type(module).forward(small, given)
    return output


def _alike(a: Tensor, b: Tensor) -> bool:
    rounding = max(torch.finfo(dtype).eps for dtype in (a.dtype, torch.float32))  # norms compute in float32 at best
    return torch.allclose(a, b, rtol=8 * rounding, atol=16 * rounding)
