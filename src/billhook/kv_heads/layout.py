"""Which positions of which parameters make queries, keys and values, and of which head."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel

from billhook.model.handed import Indices, handing_of
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import innermost
from billhook.tracing.roles import Attention, Part
from billhook.tracing.trace import trace
from billhook.units.find import find_heads
from billhook.units.units import Units

QUERY, KEY, VALUE, BESIDE = 1, 2, 4, 8
KV = KEY | VALUE | BESIDE


@dataclass(frozen=True, eq=False)
class Rows:
    """The roles of the positions along a dimension of a parameter.

    Attributes:
        dim: The dimension.
        role: For each position QUERY, KEY or VALUE, or BESIDE of what is next to keys such as a norm of them: int64.
        head: For each position the query head, or the KV head, -1 of what belongs to none: int64.
    """

    dim: int
    role: Indices
    head: Indices

    @property
    def fused(self) -> bool:
        """True if there is more than keys, or more than values."""
        return len(set(self.role.tolist())) > 1 or not self.role[0] & KV

    def keys(self, groups: int = 1) -> list[tuple[int, int, int]]:
        """Returns for each position its role, its head and its place in that; of KV heads the head's group of so many."""
        counts: dict[tuple[int, int], int] = defaultdict(int)
        found = []
        for role, head in zip(self.role.tolist(), self.head.tolist(), strict=True):
            found.append((role, head // groups if role & KV else head, counts[role, head]))
            counts[role, head] += 1
        return found


@dataclass(frozen=True, eq=False)
class KVAttention:
    """One attention, seen from its KV heads.

    Attributes:
        units: Its heads.
        place: The innermost module that makes its queries, keys and values.
        heads: How many KV heads there are.
        rows: Of the weights that make keys and values, and of their biases.
    """

    units: Units
    place: str
    heads: int
    rows: dict[str, Rows]

    @cached_property
    def queries(self) -> int:
        """How many query heads there are."""
        return self.units.count()

    def rows_beside(self, name: str, dim: int, size: int) -> Rows:
        """Returns the rows of another parameter that belongs to KV heads altogether, such as a norm over all keys."""
        member = next((one for one in self.units.members if (one.name, one.dim) == (name, dim)), None)
        head = np.zeros(size, np.int64) if member is None or self.heads == 1 else self.units.of_member(member, "kv_head")
        return Rows(dim, np.full(size, BESIDE), head)


def find_kv(model: PreTrainedModel, structure: Structure | None = None) -> dict[str, KVAttention]:
    """Finds the attentions of a model as `find_heads` names and orders them, from one run on meta tensors."""
    try:
        structure = structure or trace(model)
        units = find_heads(model, structure)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} cannot be told to use fewer KV heads: {error}") from error
    parts: dict[tuple[str, ...], list[Attention]] = {one.readers: [] for one in units.values()}
    for attention in structure.attention:
        alone = find_heads(model, replace(structure, attention=(attention,)))
        parts[next(iter(alone.values())).readers].append(attention)
    return {name: _attention(model, one, parts[one.readers]) for name, one in units.items()}


def _attention(model: PreTrainedModel, units: Units, attentions: Iterable[Attention]) -> KVAttention:
    roles: dict[tuple[str, int], list[tuple[int, Part]]] = defaultdict(list)
    for attention in attentions:
        for role, own in ((QUERY, attention.q), (KEY, attention.k), (VALUE, attention.v)):
            for part in own:
                roles[part.name, part.dim].append((role, part))
    parameters = dict(model.named_parameters())
    rows, handed = dict[str, Rows](), list[int]()
    for (name, dim), made in roles.items():
        if not any(role & KV for role, _ in made):
            continue
        rows[name] = _rows(units, name, dim, made)
        owner = name.rpartition(".")[0]
        if (handing := handing_of(model.get_submodule(owner))) is not None:
            handed.append(handing.heads)
        bias = parameters.get(f"{owner}.bias")
        if bias is not None and bias.ndim == 1 and len(bias) == made[0][1].size:
            rows[f"{owner}.bias"] = replace(rows[name], dim=0)
    place = innermost([name.rpartition(".")[0] for name, _ in roles])
    return KVAttention(units, place, min(handed) if handed else units.count("kv_head"), rows)


def _rows(units: Units, name: str, dim: int, made: Sequence[tuple[int, Part]]) -> Rows:
    role, head = (np.zeros(made[0][1].size, np.int64) for _ in range(2))
    for bit, part in made:
        role[part.positions] |= bit
    member = next((one for one in units.members if (one.name, one.dim) == (name, dim)), None)
    if member is not None:
        alone, shared = units.of_member(member), units.of_member(member, "kv_head")
        head = np.where(role & QUERY, alone, shared if units.count("kv_head") > 1 else np.zeros_like(shared))
    return Rows(dim, role, np.where(role == 0, -1, head))
