"""Units: what can be taken out of one place of a model, and which positions of which tensors belong to each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from billhook.model.handed import Indices
from billhook.tracing.axes import Axis, layout, leaves
from billhook.tracing.groups import Member

Per = Literal["head", "kv_head"]
"""What there is one number for: a query head, or a key/value head with the query heads that it serves."""

UnitKind = Literal["head", "channel", "residual", "expert"]
"""Heads of an attention, channels of a feed-forward, channels of the residual stream, experts of a mixture."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one place: the heads of one attention, the channels of one feed-forward.

    Attributes:
        kind: What a unit is.
        name: The innermost module that makes and reads the units.
        readers: The modules that read the units and nothing but them, as their only input; none where code reads them.
        index: For each position of what the readers read, the unit that it belongs to, -1 if to none: int64.
        kv_of: For each query head, the KV head that serves it; of other units, the unit itself: int64.
        leaves: The leaves of the axis that counts units; of heads, those of KV heads and of query heads beside them.
        kv_leaves: Those that count KV heads; of other units, the same.
        members: What holds units.
    """

    kind: UnitKind
    name: str
    readers: tuple[str, ...]
    index: Indices
    kv_of: Indices
    leaves: tuple[Axis, ...]
    kv_leaves: tuple[Axis, ...]
    members: tuple[Member, ...]

    def count(self, per: Per = "head") -> int:
        """How many units, or KV heads, there are."""
        return len(self.kv_of) if per == "head" else int(self.kv_of.max()) + 1

    def positions(self, per: Per = "head") -> Indices:
        """For each position of what the readers read, the unit, or KV head, that it belongs to, -1 if to none: int64."""
        return self.index if per == "head" else np.where(self.index < 0, -1, self.kv_of[self.index])

    def held_by(self, per: Per = "head") -> tuple[Member, ...]:
        """The members that hold units one by one; keys and values that serve several query heads hold KV heads only."""
        wanted = set(self.leaves if per == "head" or not self.kv_leaves else self.kv_leaves)
        return tuple(member for member in self.members if wanted <= set(leaves(member.axis)))

    def of_member(self, member: Member, per: Per = "head") -> Indices:
        """For each position of a member's dimension the unit, or KV head, that it belongs to, -1 if to none: int64."""
        if per == "kv_head" and self.kv_leaves:
            columns = [self.leaves.index(leaf) for leaf in self.kv_leaves]
            first = [int(np.flatnonzero(self.kv_of == kv)[0]) for kv in range(self.count("kv_head"))]
            return match(along(member.axis, self.kv_leaves), self.keys[first][:, columns])
        own = match(along(member.axis, self.leaves), self.keys)
        return own if per == "head" else np.where(own < 0, -1, self.kv_of[own])

    @property
    def keys(self) -> Indices:
        """For each unit, its number along every leaf: int64, `[units, leaves]`."""
        if self.kind != "head":
            return np.arange(len(self.kv_of))[:, None]
        reader = next(member for member in self.held_by() if member.reads)
        keys = along(reader.axis, self.leaves)
        return keys[[int(np.flatnonzero(self.index == unit)[0]) for unit in range(len(self.kv_of))]]


def along(axis: Axis, own: Sequence[Axis]) -> Indices:
    """For each position of an axis its number along some leaves, -1 along one that it has not: int64, `[size, leaves]`."""
    if not own:
        return np.zeros((axis.size, 1), dtype=np.int64)
    return np.stack([layout(axis, leaf) for leaf in own], axis=1)


def match(keys: Indices, units: Indices) -> Indices:
    """For each row of keys the unit whose own keys it has, -1 if none: int64.

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
