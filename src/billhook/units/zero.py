"""Sets to zero what reads given units: zeros instead of a mask."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from billhook.engine.sharding import local, reshard, sharded_as
from billhook.engine.state import fresh_casts
from billhook.model.find import find_transformer
from billhook.units.find import Chosen, find_units, numbered
from billhook.units.units import Per, UnitKind, Units


def zero_units(model: nn.Module, units: Chosen, kind: UnitKind = "head", per: Per = "head") -> None:
    """Sets the weights that read some units to zero, in place: the model computes what it does with them masked."""
    subject = find_transformer(model)
    found = find_units(subject, kind)
    zero_found(subject, found, numbered(found, units, per))


@fresh_casts()
@torch.no_grad()
def zero_found(model: nn.Module, found: Mapping[str, Units], units: Mapping[str, Sequence[int]]) -> None:
    """Sets the weights that read some of these units to zero, in place."""
    reshard(model)
    for weight, dim, positions in reading(model, found, units):
        read = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).index_fill_(dim, positions, True)
        local(weight).masked_fill_(local(sharded_as(read, weight)), 0)


def reading(
    model: nn.Module, found: Mapping[str, Units], units: Mapping[str, Sequence[int]]
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Yields what reads some units: a parameter, one of its dimensions, and the positions along it."""
    for name, numbers in units.items():
        for member in found[name].held_by():
            if member.reads:
                weight = model.get_parameter(member.name)
                positions = np.flatnonzero(np.isin(found[name].of_member(member), numbers))
                yield weight, member.dim, torch.from_numpy(positions).to(weight.device)
