"""Units: the removable parts of a module, and their positions in tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import check_types
from billhook.linalg import Indices
from billhook.tracing.axes import Axis, layout, leaves
from billhook.tracing.groups import Member

Per = Literal["head", "kv_head"]
"""Numbering of query heads, or of KV heads with their query heads."""

UnitKind = Literal["head", "channel", "residual", "expert", "block", "token"]
"""Heads of attention, MLP channels, hidden dimensions, experts, blocks of a stack, and tokens of the vocabulary."""

PLURAL: dict[UnitKind, str] = {
    "head": "heads",
    "channel": "channels",
    "residual": "hidden dimensions",
    "expert": "experts",
    "block": "blocks",
    "token": "tokens",
}


@dataclass(frozen=True, eq=False, repr=False)
class Units:
    """The units of a module: heads of attention, channels of an MLP, or blocks of a stack.

    Attributes:
        kind: The kind of all units.
        name: The innermost module that produces and consumes the units. For blocks, their module list.
        readers: Modules whose only input are the units. Empty if code consumes them.
        index: Unit of each consumer position, -1 for none: int64.
        kv_of: KV head of each query head. For other units, the unit itself: int64.
        leaves: The axis leaves that count units. For heads, KV heads and query heads in each.
        kv_leaves: The axis leaves that count KV heads. For other units, the same.
        members: The parameters with units along a dimension.
        of_experts: Whether each expert of a mixture has channels of its own at these positions. The readers are then its matrices
            within `expert_layers`.

    Example:
        >>> import billhook as bh
        >>> heads = bh.find_units(bh.load("tiny"), "head")["model.layers.0.self_attn"]
        >>> heads.count(), heads.count("kv_head"), heads.readers
        (8, 8, ('model.layers.0.self_attn.o_proj',))
    """

    kind: UnitKind
    name: str
    readers: tuple[str, ...]
    index: Indices
    kv_of: Indices
    leaves: tuple[Axis, ...]
    kv_leaves: tuple[Axis, ...]
    members: tuple[Member, ...]
    of_experts: bool = False

    def __post_init__(self) -> None:
        check_types(Units, vars(self))

    @property
    def own_readers(self) -> tuple[str, ...]:
        """The readers that are modules of the model, also outside of `expert_layers`."""
        return () if self.of_experts else self.readers

    def __repr__(self) -> str:
        return f"Units({self.kind!r}, {' and '.join(f'{number:,}' for number in counts(self))} in {self.name!r})"

    def count(self, per: Per = "head") -> int:
        """Returns the number of units, or of KV heads."""
        return len(self.kv_of) if per == "head" else int(self.kv_of.max()) + 1

    def query_heads(self, kv_heads: Iterable[int]) -> list[int]:
        """Returns the query heads of some KV heads."""
        query_heads: list[int] = np.flatnonzero(np.isin(self.kv_of, list(kv_heads))).tolist()
        return query_heads

    def positions(self, per: Per = "head") -> Indices:
        """Returns the unit (or KV head) of each consumer position, -1 for none: int64."""
        return self.index if per == "head" else np.where(self.index < 0, -1, self.kv_of[self.index])

    def members_by_unit(self, per: Per = "head") -> tuple[Member, ...]:
        """Returns the members that contain units separately, not only KV heads."""
        wanted = set(self.leaves if per == "head" or not self.kv_leaves else self.kv_leaves)
        return tuple(member for member in self.members if wanted <= set(leaves(member.axis)))

    @cached_property
    def _known(self) -> dict[tuple[object, ...], Any]:
        """A cache of results for members, which a search requests repeatedly."""
        return {}

    def of_member(self, member: Member, per: Per = "head") -> Indices:
        """Returns the unit (or KV head) of each position of a member, -1 for none: int64."""
        key = member.name, member.dim, per
        if key not in self._known:
            if per == "kv_head" and self.kv_leaves:
                columns = [self.leaves.index(leaf) for leaf in self.kv_leaves]
                first = [int(np.flatnonzero(self.kv_of == kv)[0]) for kv in range(self.count("kv_head"))]
                self._known[key] = match(axis_numbers(member.axis, self.kv_leaves), self.keys[first][:, columns])
            else:
                units = match(axis_numbers(member.axis, self.leaves), self.keys)
                self._known[key] = units if per == "head" else np.where(units < 0, -1, self.kv_of[units])
        units_of: Indices = self._known[key]
        return units_of

    def units_at(self, member: Member) -> tuple[Indices, Indices]:
        """Returns the location of each position, and by location a mask of its units."""
        key = member.name, member.dim
        if key not in self._known:
            locations, inverse = np.unique(axis_numbers(member.axis, self.leaves), axis=0, return_inverse=True)
            same = (self.keys[None] == locations[:, None]) | (locations < 0)[:, None]
            holds = np.all(same, axis=2) & np.any(locations >= 0, axis=1, keepdims=True)
            self._known[key] = inverse.reshape(-1), holds
        holders: tuple[Indices, Indices] = self._known[key]
        return holders

    @cached_property
    def keys(self) -> Indices:
        """Numbers of each unit along all leaves: int64, `[units, leaves]`."""
        if self.kind != "head":
            return np.arange(len(self.kv_of))[:, None]
        reader = next(member for member in self.members_by_unit() if member.reads)
        keys = axis_numbers(reader.axis, self.leaves)
        return keys[[int(np.flatnonzero(self.index == unit)[0]) for unit in range(len(self.kv_of))]]


UnitsByModule = Mapping[str, Units]
"""Units by the name of their module."""
UnitNumbers = dict[str, list[int]]
"""Numbers of units by the name of their module."""


def counts(units: Units) -> tuple[int, ...]:
    """Returns the number of units. For attention, of query heads and KV heads."""
    return (units.count(), units.count("kv_head")) if units.kind == "head" else (units.count(),)


def plural(kinds: Iterable[UnitKind]) -> str:
    """Names units in a message, by kind if all have the same.

    >>> plural(["head", "head"]), plural(["head", "channel"])
    ('heads', 'units')
    """
    different = set(kinds)
    return PLURAL[different.pop()] if len(different) == 1 else "units"


def axis_numbers(axis: Axis, leaves: Sequence[Axis]) -> Indices:
    """Returns the numbers of axis positions along leaves: int64, `[size, leaves]`."""
    if not leaves:
        return np.zeros((axis.size, 1), dtype=np.int64)
    return np.stack([layout(axis, leaf) for leaf in leaves], axis=1)


def match(keys: Indices, units: Indices) -> Indices:
    """Returns the unit with the same keys for each row, -1 for none: int64.

    >>> match(np.array([[0, 1], [1, 0], [-1, 0]]), np.array([[1, 0], [0, 1]])).tolist()
    [1, 0, -1]
    """
    if units.shape[1] == 1 and np.array_equal(units[:, 0], np.arange(len(units))):
        return np.where(keys[:, 0] < len(units), keys[:, 0], -1)
    _, inverse = np.unique(np.concatenate([units, keys]), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    number = np.full(inverse.max() + 1, -1)
    number[inverse[: len(units)]] = np.arange(len(units))
    return number[inverse[len(units) :]]


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter dimension with units. `units` maps positions, with `count` for none."""

    module: str
    name: str
    dim: int
    units: Tensor
    count: int

    def sum_others(self, values: Tensor) -> Tensor:
        """Sums values over all other dimensions: `[positions]`."""
        others = [dim for dim in range(values.dim()) if dim != self.dim]
        return values.sum(others) if others else values

    def by_unit(self, positions: Tensor) -> Tensor:
        """Sums values of positions by unit: float64, `[units]`, on the CPU."""
        sums = torch.zeros(self.count + 1, dtype=torch.float64)
        return sums.index_add_(0, self.units, positions.detach().cpu().double())[: self.count]


def parts_of(model: nn.Module, units: UnitsByModule, per: Per) -> list[Part]:
    """Returns the parameter dimensions of all units. Raises for units without any."""
    names: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts: dict[tuple[str, str, int], Part] = {}
    for module, layer in units.items():
        count = layer.count(per)
        for member in layer.members_by_unit(per):
            if member.buffer:
                continue
            if member.name not in parameters:
                raise ValueError(
                    f"units: {member.name} of {module} is not a parameter of the model (another model, or quantized?)."
                )
            name = names.setdefault(id(parameters[member.name]), member.name)
            unit_of = torch.from_numpy(layer.of_member(member, per) % (count + 1))  # -1, of none, becomes `count`
            parts.setdefault((module, name, member.dim), Part(module, name, member.dim, unit_of, count))
        if not any(part.module == module for part in parts.values()):
            other = "; of blocks, BlockInfluence, Ablation and RandomUnits work" if layer.kind == "block" else ""
            raise ValueError(f"importance: no parameter of {module} has its units one by one{other}")
    return list(parts.values())
