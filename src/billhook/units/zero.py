"""Sets to zero what reads given units: zeros instead of a mask."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from billhook.model.find import find_transformer
from billhook.running.shards import local, reshard, sharded_as
from billhook.units.heads import Chosen, check_layers, find_heads
from billhook.units.units import Per, Units


def zero_heads(model: nn.Module, heads: Chosen, per: Per = "head") -> None:
    """Makes zero the weights that read some heads, in place: the model computes what it does with them masked, without a mask.

    Args:
        model: As in `prune_heads`.
        heads: The heads, as in `prune_heads`.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Raises:
        ValueError: If there is no such layer or head.
    """
    subject = find_transformer(model)
    found = find_heads(subject)
    chosen = check_layers(found, heads, per)
    if per == "kv_head":
        chosen = {name: np.flatnonzero(np.isin(found[name].kv_of, own)).tolist() for name, own in chosen.items()}
    zero_units(subject, found, chosen)


@torch.no_grad()
def zero_units(model: nn.Module, found: Mapping[str, Units], gone: Mapping[str, Sequence[int]]) -> None:
    """Makes zero the weights that read some units, in place: the model computes what it does with them masked."""
    reshard(model)
    for weight, dim, positions in _reading(model, found, gone):
        read = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).index_fill_(dim, positions, True)
        local(weight).masked_fill_(local(sharded_as(read, weight)), 0)


def _reading(
    model: nn.Module, found: Mapping[str, Units], gone: Mapping[str, Sequence[int]]
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """What reads some units: the parameters, which of their dimensions, and the positions along it."""
    for name, numbers in gone.items():
        for member in found[name].held_by():
            if member.reads:
                weight = model.get_parameter(member.name)
                positions = np.flatnonzero(np.isin(found[name].of_member(member), numbers))
                yield weight, member.dim, torch.from_numpy(positions).to(weight.device)
