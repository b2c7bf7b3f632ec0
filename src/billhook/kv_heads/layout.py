"""Where the queries, keys, values and outputs of an attention lie in its parameters, and of which head each position is."""

import itertools
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.linalg import in_float64
from billhook.model.handed import Indices, handing_of
from billhook.model.linears import as_it_lies, matrix_of
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import innermost
from billhook.tracing.roles import Attention, Part
from billhook.tracing.trace import trace
from billhook.units.find import find_heads
from billhook.units.units import Per, Units

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


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Where the heads of one kind lie: the linear that makes them, or by which they `are_read`, and their positions in it.

    Positions are `[heads, width]`.
    """

    linear: str
    index: Indices
    are_read: bool = False


@dataclass(frozen=True, eq=False)
class Projections:
    """Where the queries, keys, values and outputs of the attention of that name lie; `o` is what reads the heads."""

    name: str
    q: HeadRows
    k: HeadRows
    v: HeadRows
    o: HeadRows

    @property
    def kinds(self) -> dict[str, HeadRows]:
        """Queries, keys, values and outputs, as in `Stacks`."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    @property
    def linears(self) -> list[str]:
        """The linears that make and read the heads, once each."""
        return list(dict.fromkeys(rows.linear for rows in self.kinds.values()))

    @property
    def kv_heads(self) -> int:
        """How many KV heads there are."""
        return len(self.k.index)

    @property
    def queries(self) -> int:
        """How many query heads read one KV head."""
        return len(self.q.index) // self.kv_heads


@dataclass(frozen=True, eq=False)
class Stacks:
    """The weights of one attention, head by head, each with its bias as a last column where it has one, float64.

    Attributes:
        q: `[query heads, width of keys, hidden]`.
        k: `[KV heads, width of keys, hidden]`.
        v: `[KV heads, width of values, hidden]`.
        o: `[query heads, hidden, width of values]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def find_projections(model: nn.Module, structure: Structure, names: Container[str] | None = None) -> dict[str, Projections]:
    """Finds where the projections of each attention, or of those named, lie, by its name, in the order in which they run.

    Raises:
        ValueError: If heads are not made and read by one `nn.Linear` or `Conv1D` each.
    """
    found = find_heads(model, structure)
    by_reader = {part.name.rpartition(".")[0]: attention for attention in structure.attention for part in attention.o}
    own = {name: units for name, units in found.items() if names is None or name in names}
    return {name: _projections(model, units, by_reader[units.readers[0]]) for name, units in own.items()}


def read(model: nn.Module, place: Projections) -> Stacks:
    """Returns the weights of an attention as stacks of heads."""
    return Stacks(**{kind: read_heads(model, rows) for kind, rows in place.kinds.items()})


def read_heads(model: nn.Module, rows: HeadRows) -> Tensor:
    """Returns a copy of the weights of heads of one kind, a stack of `Stacks`."""
    weight, bias = matrix_of(model.get_submodule(rows.linear))
    if rows.are_read:
        return in_float64(weight[:, rows.index]).transpose(0, 1)
    own = in_float64(weight[rows.index])
    return own if bias is None else torch.cat([own, in_float64(bias[rows.index])[..., None]], -1)


def written(model: nn.Module, place: Projections, stacks: Stacks) -> dict[str, dict[str, Tensor]]:
    """Returns the new parameters of an attention's linears, by linear, in their own sizes and dtypes."""
    linears = {name: _copy(model, name) for name in place.linears}
    put(linears, place, stacks)
    return {name: as_it_lies(model.get_submodule(name), *both) for name, both in linears.items()}


def put(linears: Mapping[str, tuple[Tensor, Tensor | None]], place: Projections, stacks: Stacks) -> None:
    """Writes stacks of heads into the weights, `[out_features, in_features]`, and the biases of an attention's linears."""
    for kind, rows in place.kinds.items():
        put_heads(linears[rows.linear], rows, vars(stacks)[kind])


def put_heads(linear: tuple[Tensor, Tensor | None], rows: HeadRows, stack: Tensor) -> None:
    """Writes a stack of heads into the weight, `[out_features, in_features]`, and the bias of the linear where they lie."""
    weight, bias = linear
    if rows.are_read:
        weight[:, rows.index] = stack.transpose(0, 1).to(weight)
        return
    weight[rows.index] = stack[..., : weight.shape[1]].to(weight)
    if bias is not None:
        bias[rows.index] = stack[..., -1].to(bias)


def _projections(model: nn.Module, units: Units, attention: Attention) -> Projections:
    kinds = (attention.q, attention.k, attention.v)
    parts = [_one(units, kind, what) for kind, what in zip(kinds, ("queries", "keys", "values"), strict=True)]
    if len(units.readers) != 1:
        raise ValueError(f"{units.name}: its heads are read by {len(units.readers)} modules, not by one linear")
    counted: tuple[Per, ...] = ("head", "kv_head", "kv_head")
    q, k, v = (_head_rows(model, units, part, per) for part, per in zip(parts, counted, strict=True))
    o = HeadRows(units.readers[0], _split(units.index, units.count(), units.name), are_read=True)
    for rows in (q, k, v, o):
        if not isinstance(model.get_submodule(rows.linear), nn.Linear | Conv1D):
            raise ValueError(f"{rows.linear} is a {type(model.get_submodule(rows.linear)).__name__}, not an nn.Linear or Conv1D")
    if not np.array_equal(units.kv_of, np.arange(len(units.kv_of)) // (len(units.kv_of) // units.count("kv_head"))):
        raise ValueError(f"{units.name}: query heads that share a KV head do not lie next to each other")
    if q.index.shape[1] != k.index.shape[1]:
        raise ValueError(
            f"{units.name}: {q.index.shape[1]} numbers of a query, {k.index.shape[1]} of a key come from its projections"
        )
    for (one, what), (other, and_what) in itertools.combinations(zip((q, k, v), ("queries", "keys", "values"), strict=True), 2):
        if one.linear == other.linear and np.intersect1d(one.index, other.index).size:
            raise ValueError(f"{units.name}: its {what} and {and_what} are the same outputs of {one.linear}")
    return Projections(units.name, q, k, v, o)


def _one(units: Units, parts: Sequence[Part], what: str) -> Part:
    if len(parts) != 1:
        made = " and ".join(part.name for part in parts)
        raise ValueError(f"{units.name}: its {what} are made by {made}, not by one linear (with LoRA attached, merge it first)")
    return parts[0]


def _head_rows(model: nn.Module, units: Units, part: Part, per: Per) -> HeadRows:
    member = next((m for m in units.members if m.name == part.name and not m.reads), None)
    if member is None:
        raise ValueError(f"{units.name}: {part.name} is not known to hold heads")
    own = np.full(part.size, -1)
    own[part.positions] = units.of_member(member, per)[part.positions]
    return HeadRows(part.name.rpartition(".")[0], _split(own, units.count(per), part.name))


def _split(number: Indices, count: int, what: str) -> Indices:
    """Returns the positions of each head, in their order."""
    own = [np.flatnonzero(number == head) for head in range(count)]
    if len({len(positions) for positions in own}) != 1 or not len(own[0]):
        raise ValueError(f"{what}: its {count} heads are not of one width")
    return np.stack(own)


def _copy(model: nn.Module, linear: str) -> tuple[Tensor, Tensor | None]:
    weight, bias = matrix_of(model.get_submodule(linear))
    return weight.clone(), None if bias is None else bias.clone()


def moved_values(model: nn.Module, place: Projections, order: Sequence[int]) -> dict[str, dict[str, Tensor]]:
    """Returns new parameters as `written` does, in which each KV head has the values of the one that `order` says."""
    linear, to, source = model.get_submodule(place.v.linear), place.v.index, place.v.index[list(order)]
    weight, bias = (None if one is None else one.clone() for one in matrix_of(linear))
    assert weight is not None
    for tensor in (weight,) if bias is None else (weight, bias):
        tensor[to] = tensor[source]
    return {place.v.linear: as_it_lies(linear, weight, bias)}
