"""Positions of the heads of an attention module in its parameters."""

import itertools
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import check_one_device
from billhook.linalg import Indices, in_float64
from billhook.model import is_linear, matrix_of, to_layout, to_parameters
from billhook.repairs.matching import Tie
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Member, common_module
from billhook.tracing.roles import Attention, Part
from billhook.tracing.trace import trace
from billhook.units import Per, Units, find_heads

QUERY = 1
KEY = 2
VALUE = 4
BESIDE = 8
KV = KEY | VALUE | BESIDE


@dataclass(frozen=True, eq=False)
class Rows:
    """Roles of the positions along a dimension of a parameter.

    Attributes:
        dim: The dimension.
        role: By position QUERY, KEY, or VALUE, or BESIDE for parameters next to keys such as their norm: int64.
        head: By position the query head or KV head, -1 for none: int64.
    """

    dim: int
    role: Indices
    head: Indices

    @property
    def fused(self) -> bool:
        """True if the parameter holds more than keys, or more than values."""
        return len(set(self.role.tolist())) > 1 or not self.role[0] & KV

    def keys(self, groups: int = 1) -> list[tuple[int, int, int]]:
        """Returns by position its role, its head (or group of KV heads), and its rank within both."""
        ranks: dict[tuple[int, int], Iterator[int]] = defaultdict(itertools.count)
        pairs = zip(self.role.tolist(), self.head.tolist(), strict=True)
        return [(role, head // groups if role & KV else head, next(ranks[role, head])) for role, head in pairs]


@dataclass(frozen=True, eq=False)
class KVAttention:
    """The KV heads of an attention module.

    Attributes:
        units: Its heads.
        module: Innermost module that contains its projections.
        heads: Number of KV heads.
        rows: Roles of the rows of key and value weights and biases.
    """

    units: Units
    module: str
    heads: int
    rows: dict[str, Rows]

    @cached_property
    def queries(self) -> int:
        """Number of query heads."""
        return self.units.count()

    def rows_of(self, name: str, dim: int, size: int) -> Rows:
        """Returns the rows of a parameter, which all KV heads may share, such as a norm."""
        rows = self.rows.get(name)
        if rows is not None and rows.dim == dim:
            return rows
        member = _member(self.units, name, dim)
        head = np.zeros(size, np.int64) if member is None or self.heads == 1 else self.units.of_member(member, "kv_head")
        return Rows(dim, np.full(size, BESIDE), head)


KVAttentions = Mapping[str, KVAttention]


def find_kv(model: PreTrainedModel) -> dict[str, KVAttention]:
    """Finds the attention modules of a model, from a trace on the meta device."""
    check_one_device(model)  # says so itself: the model would be supported on one device
    try:
        structure = trace(model)
        heads = find_heads(model, structure)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} does not support fewer KV heads: {str(error).removeprefix('model: ')}"
        ) from error
    by_readers = defaultdict(list)
    for attention in structure.attention:
        units, *_ = find_heads(model, replace(structure, attention=(attention,))).values()
        by_readers[units.readers].append(attention)
    parameters = dict(model.named_parameters())
    attentions = {}
    for attention_name, units in heads.items():
        parts: dict[tuple[str, int], list[tuple[int, Part]]] = defaultdict(list)
        for attention in by_readers[units.readers]:
            for bit, projected in ((QUERY, attention.q), (KEY, attention.k), (VALUE, attention.v)):
                for part in projected:
                    parts[part.name, part.dim].append((bit, part))
        kv_heads = units.count("kv_head")
        rows = {}
        for (name, dim), made in parts.items():
            if not any(bit & KV for bit, _ in made):
                continue
            role, head = np.zeros((2, made[0][1].size), np.int64)
            for bit, part in made:
                role[part.positions] |= bit
            if (member := _member(units, name, dim)) is not None:
                head = np.where(role & QUERY, units.of_member(member), units.of_member(member, "kv_head") * (kv_heads > 1))
            rows[name] = Rows(dim, role, np.where(role == 0, -1, head))
            owner = name.rpartition(".")[0]
            bias = parameters.get(f"{owner}.bias")
            if bias is not None and bias.shape == role.shape:
                rows[f"{owner}.bias"] = replace(rows[name], dim=0)
        module = common_module([name.rpartition(".")[0] for name, _ in parts])
        attentions[attention_name] = KVAttention(units, module, kv_heads, rows)
    return attentions


def _member(units: Units, name: str, dim: int) -> Member | None:
    return next((member for member in units.members if (member.name, member.dim) == (name, dim)), None)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The linear layer of a kind of head, and its positions: `[heads, head dimension]`."""

    linear: str
    index: Indices
    are_read: bool = False


@dataclass(frozen=True, eq=False)
class Projections:
    """Positions of queries, keys, and values, and of the consumer `o` of the heads."""

    name: str
    q: HeadRows
    k: HeadRows
    v: HeadRows
    o: HeadRows

    @property
    def kinds(self) -> dict[str, HeadRows]:
        """Queries, keys, values, and outputs, as in `HeadTensors`."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    @property
    def linears(self) -> list[str]:
        """Names of the linear layers, each once."""
        return list(dict.fromkeys(rows.linear for rows in self.kinds.values()))

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return len(self.k.index)

    @property
    def queries(self) -> int:
        """Number of query heads per KV head."""
        return len(self.q.index) // self.kv_heads


@dataclass(frozen=True, eq=False)
class HeadTensors:
    """Weights of an attention module by head, in float64, with biases as a last column.

    Attributes:
        q: `[query heads, key dimension, hidden]`.
        k: `[KV heads, key dimension, hidden]`.
        v: `[KV heads, value dimension, hidden]`.
        o: `[query heads, hidden, value dimension]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def in_order(self, order: Sequence[int]) -> "HeadTensors":
        """Returns reordered KV heads, or some of them, with their query heads."""
        queries = len(self.q) // len(self.k)
        kv_heads = list(order)
        query_heads = [head * queries + query for head in order for query in range(queries)]
        return HeadTensors(self.q[query_heads], self.k[kv_heads], self.v[kv_heads], self.o[query_heads])


def find_projections(model: nn.Module, structure: Structure, names: Container[str] | None = None) -> dict[str, Projections]:
    """Finds the projections of attention modules, by name, in the order in which they run.

    Raises:
        ValueError: If heads are not produced and consumed by one `nn.Linear` or `Conv1D` each.
    """
    by_reader = {part.name.rpartition(".")[0]: attention for attention in structure.attention for part in attention.o}
    heads = find_heads(model, structure).items()
    return {
        name: _projections(model, units, by_reader[units.readers[0]]) for name, units in heads if names is None or name in names
    }


def read(model: nn.Module, projections: Projections) -> HeadTensors:
    """Returns copies of the weights of an attention module, by head."""
    return HeadTensors(**{kind: read_heads(model, rows) for kind, rows in projections.kinds.items()})


def read_heads(model: nn.Module, rows: HeadRows) -> Tensor:
    """Returns a copy of the weights of a kind of head, a tensor of `HeadTensors`."""
    weight, bias = matrix_of(model.get_submodule(rows.linear))
    if rows.are_read:
        return in_float64(weight[:, rows.index]).transpose(0, 1)
    heads = in_float64(weight[rows.index])
    return heads if bias is None else torch.cat([heads, in_float64(bias[rows.index])[..., None]], -1)


def written(model: nn.Module, projections: Projections, tensors: HeadTensors) -> dict[str, dict[str, Tensor]]:
    """Returns the new parameters by linear layer, in their sizes and dtypes."""
    linears = {}
    for kind, rows in projections.kinds.items():
        if rows.linear not in linears:  # queries, keys and values may be made by one
            weight, bias = matrix_of(model.get_submodule(rows.linear))
            linears[rows.linear] = weight.clone(), None if bias is None else bias.clone()
        put_heads(linears[rows.linear], rows, vars(tensors)[kind])
    return {name: to_parameters(model.get_submodule(name), *matrix) for name, matrix in linears.items()}


def ties_of(model: nn.Module, projections: Mapping[str, Projections], groups: Mapping[str, int]) -> dict[str, Tie]:
    """Returns functions that average the gradient of a parameter over each group of KV heads.

    Args:
        model: The model.
        projections: The attention modules.
        groups: Number of groups by module; others have no ties.
    """
    ties = dict[str, Tie]()
    for module in projections.keys() & groups.keys():
        k = projections[module].k
        v = projections[module].v
        number = groups[module]
        for linear in dict.fromkeys((k.linear, v.linear)):
            averaged = partial(_averaged, model.get_submodule(linear), [rows for rows in (k, v) if rows.linear == linear], number)
            ties |= {f"{linear}.{name}": averaged for name in ("weight", "bias")}
    return ties


def _averaged(linear: nn.Module, heads: Sequence[HeadRows], groups: int, gradient: Tensor) -> Tensor:
    matrix = to_layout(linear, gradient).clone() if gradient.dim() > 1 else gradient.clone()
    for rows in heads:
        of_groups = matrix[rows.index.reshape(groups, -1, *rows.index.shape[1:])]
        matrix[rows.index] = of_groups.mean(1, keepdim=True).expand_as(of_groups).flatten(0, 1)
    return to_layout(linear, matrix) if gradient.dim() > 1 else matrix


def put_heads(linear: tuple[Tensor, Tensor | None], rows: HeadRows, tensor: Tensor) -> None:
    """Writes heads into the weight and bias of their linear layer."""
    weight, bias = linear
    if rows.are_read:
        weight[:, rows.index] = tensor.transpose(0, 1).to(weight)
        return
    weight[rows.index] = tensor[..., : weight.shape[1]].to(weight)
    if bias is not None:
        bias[rows.index] = tensor[..., -1].to(bias)


def _projections(model: nn.Module, units: Units, attention: Attention) -> Projections:
    made = {"queries": attention.q, "keys": attention.k, "values": attention.v}
    for what, parts in made.items():
        if len(parts) != 1:
            by = " and ".join(part.name for part in parts)
            raise ValueError(f"{units.name}: its {what} are made by {by}, not by one linear (with LoRA attached, merge it first)")
    if len(units.readers) != 1:
        raise ValueError(f"{units.name}: its heads are read by {len(units.readers)} modules, not by one linear")
    rows = {}
    for what, (part,) in made.items():
        member = next((member for member in units.members if member.name == part.name and not member.reads), None)
        if member is None:
            raise ValueError(f"{units.name}: {part.name} is not known to hold heads")
        per: Per = "head" if what == "queries" else "kv_head"
        head = np.full(part.size, -1)
        head[part.positions] = units.of_member(member, per)[part.positions]
        rows[what] = HeadRows(part.name.rpartition(".")[0], _by_head(head, units.count(per), part.name))
    rows["outputs"] = HeadRows(units.readers[0], _by_head(units.index, units.count(), units.name), are_read=True)
    for head_rows in rows.values():
        module = model.get_submodule(head_rows.linear)
        if not is_linear(module):
            raise ValueError(f"{head_rows.linear} is a {type(module).__name__}, not an nn.Linear or Conv1D")
    if not np.array_equal(units.kv_of, np.arange(len(units.kv_of)) // (len(units.kv_of) // units.count("kv_head"))):
        raise ValueError(f"{units.name}: query heads that share a KV head are not adjacent")
    width = rows["queries"].index.shape[1]
    key_width = rows["keys"].index.shape[1]
    if width != key_width:
        raise ValueError(f"{units.name}: {width} numbers of a query, {key_width} of a key come from its projections")
    for first, second in itertools.combinations(made, 2):
        if rows[first].linear == rows[second].linear and np.intersect1d(rows[first].index, rows[second].index).size:
            raise ValueError(f"{units.name}: its {first} and {second} are the same outputs of {rows[first].linear}")
    return Projections(units.name, *rows.values())


def _by_head(head: Indices, count: int, what: str) -> Indices:
    """Returns the positions of each head, in order."""
    positions = [np.flatnonzero(head == number) for number in range(count)]
    if len(set(map(len, positions))) != 1 or not len(positions[0]):
        raise ValueError(f"{what}: its {count} heads are not of one width")
    return np.stack(positions)
