"""Finds where units stand in parameters, and sums values of a parameter's shape over each unit."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.units.units import Per, Units


@dataclass(frozen=True, eq=False)
class Part:
    """A dimension of a parameter with units of a place along it: for each position its unit, `count` if none, int64."""

    place: str
    name: str
    dim: int
    units: Tensor
    count: int

    def along(self, values: Tensor) -> Tensor:
        """Sums values of the parameter's shape over all other dimensions: `[positions]`."""
        others = [dim for dim in range(values.dim()) if dim != self.dim]
        return values.sum(others) if others else values

    def by_unit(self, positions: Tensor) -> Tensor:
        """Sums values of the positions over those of each unit: float64, `[units]`, on the CPU."""
        sums = torch.zeros(self.count + 1, dtype=torch.float64)
        return sums.index_add_(0, self.units, positions.detach().cpu().double())[: self.count]


def parts_of(model: nn.Module, units: Mapping[str, Units], per: Per) -> list[Part]:
    """Returns the parts of all places, in order; a parameter under several names has its first. Refuses a place without any."""
    names: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts: dict[tuple[str, str, int], Part] = {}
    for place, one in units.items():
        count = one.count(per)
        for member in one.held_by(per):
            if not member.buffer:
                if member.name not in parameters:
                    raise ValueError(
                        f"units: {member.name} of {place} is no parameter of the model (is it another's, or quantised?)"
                    )
                name = names.setdefault(id(parameters[member.name]), member.name)
                of = torch.from_numpy(one.of_member(member, per) % (count + 1))
                parts.setdefault((place, name, member.dim), Part(place, name, member.dim, of, count))
        if not any(part.place == place for part in parts.values()):
            other = "; of blocks, BlockInfluence, Ablation and RandomUnits work" if one.kind == "block" else ""
            raise ValueError(f"importance: no parameter of {place} has its units one by one{other}")
    return list(parts.values())
