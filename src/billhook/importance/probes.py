"""Observes units while a batch runs: what reads them, which tokens count, and losses that depend on them."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from billhook.units.units import PLURAL, Per, Units


def scalar_loss(loss: Tensor) -> Tensor:
    """Returns a loss that can be differentiated; refuses more than one number, and one without a gradient."""
    if loss.numel() != 1:
        raise ValueError(f"loss: one number is needed, not a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss: it depends on no unit, as it has no gradient (was it detached, or computed without gradients?)")
    return loss.reshape(())


def no_gradient_message(name: str) -> str:
    """Returns the message for a loss that does not depend on a place."""
    return f"loss: it does not depend on the units of {name}; score the other places, or use a loss that it has a part in"


def check_consumers(units: Mapping[str, Units], who: str) -> None:
    """Refuses units that no module of its own reads, as experts and blocks."""
    for name, of_place in units.items():
        if not of_place.readers:
            works = "BlockInfluence, Ablation" if of_place.kind == "block" else "Taylor, WeightNorm"
            raise ValueError(
                f"importance: {who} looks at what modules read, and the units of {name} ({PLURAL[of_place.kind]}) are read by "
                f"none of their own; {works} and RandomUnits work"
            )


def consumer_modules(model: nn.Module, units: Units) -> dict[str, nn.Module]:
    """Returns the modules that read units, each once, though it may stand in several places of the model."""
    named = {id(model.get_submodule(reader)): reader for reader in reversed(units.readers)}
    return {reader: model.get_submodule(reader) for reader in units.readers if reader in named.values()}


def by_unit(values: Tensor, units: Units, per: Per) -> Tensor:
    """Sums over the positions of each unit: `[..., positions]` to `[..., units]`."""
    positions, count = units.positions(per), units.count(per)
    size = len(positions) // count
    if np.array_equal(positions, np.repeat(np.arange(count), size)):
        return values if size == 1 else values.reshape(*values.shape[:-1], count, size).sum(-1)
    index = torch.from_numpy(positions % (count + 1)).to(values.device)
    return values.new_zeros(*values.shape[:-1], count + 1).index_add_(-1, index, values)[..., :count]


def mask_padding(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Sets the values of tokens that do not count to zero, if there is one value for each token."""
    if tokens is None or tokens.shape != values.shape[:-1]:
        return values
    return values.masked_fill(~tokens.to(values.device)[..., None], 0)


def count_tokens(values: Tensor, tokens: Tensor | None) -> int:
    """Counts the tokens that count."""
    return values.shape[:-1].numel() if tokens is None or tokens.shape != values.shape[:-1] else int(tokens.sum())
