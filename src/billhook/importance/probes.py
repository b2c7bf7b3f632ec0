"""Observes units during a batch: their consumer layers, non-padding tokens, and losses."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from billhook.units.units import PLURAL, Per, Units


def scalar_loss(loss: Tensor) -> Tensor:
    """Returns a differentiable loss; raises if it is not a single number or has no gradient."""
    if loss.numel() != 1:
        raise ValueError(f"loss must be a single number, got a tensor of shape {list(loss.shape)}.")
    if not loss.requires_grad:
        raise ValueError("loss has no gradient, so it depends on no unit. Do not detach it, or compute it under no_grad.")
    return loss.reshape(())


def no_gradient_message(name: str) -> str:
    """Returns the message for a loss that does not depend on a module."""
    return f"loss does not depend on the units of {name}. Score the other modules, or use a loss that depends on them."


def check_consumers(units: Mapping[str, Units], importance: str) -> None:
    """Raises for units without consumer layers, such as experts and blocks."""
    for name, module_units in units.items():
        if not module_units.readers:
            works = "BlockInfluence, Ablation" if module_units.kind == "block" else "Taylor, WeightNorm"
            raise ValueError(
                f"importance={importance} needs consumer layers, and the units of {name} ({PLURAL[module_units.kind]}) have "
                f"none. Use {works}, or RandomUnits."
            )


def consumer_modules(model: nn.Module, units: Units) -> dict[str, nn.Module]:
    """Returns the consumer layers of units; a layer with several names appears only once."""
    names = {id(model.get_submodule(consumer)): consumer for consumer in reversed(units.readers)}
    return {consumer: model.get_submodule(consumer) for consumer in units.readers if consumer in names.values()}


def by_unit(values: Tensor, units: Units, per: Per) -> Tensor:
    """Sums over the positions of each unit: `[..., positions]` to `[..., units]`."""
    positions, count = units.positions(per), units.count(per)
    size = len(positions) // count
    if np.array_equal(positions, np.repeat(np.arange(count), size)):
        return values if size == 1 else values.reshape(*values.shape[:-1], count, size).sum(-1)
    index = torch.from_numpy(positions % (count + 1)).to(values.device)
    return values.new_zeros(*values.shape[:-1], count + 1).index_add_(-1, index, values)[..., :count]


def mask_padding(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Zeroes values, `[..., size]`, of padding tokens, `[...]`, if shapes fit."""
    if tokens is None or tokens.shape != values.shape[:-1]:
        return values
    return values.masked_fill(~tokens.to(values.device)[..., None], 0)


def count_tokens(values: Tensor, tokens: Tensor | None) -> int:
    """Counts the non-padding tokens of values `[..., size]`, by a mask `[...]`."""
    return values.shape[:-1].numel() if tokens is None or tokens.shape != values.shape[:-1] else int(tokens.sum())
