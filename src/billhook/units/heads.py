"""Finds the heads of a traced model, as the module that reads them sees them: which positions of its input are which head."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from billhook.model.adapter_layers import is_adapter
from billhook.model.shapes.handed import Indices
from billhook.tracing.axes import Axis, leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member, innermost
from billhook.tracing.roles import Attention
from billhook.units.units import Units, along


def find_heads(model: nn.Module, structure: Structure) -> dict[str, Units]:
    """Finds the heads of each attention of a traced model, by its name, as they run; refuses none, or ones not told apart."""
    found: dict[str, Units] = {}
    seen: set[tuple[str, ...]] = set()
    for attention in structure.attention:
        heads = _heads(model, structure, attention)
        if heads.readers not in seen:
            seen.add(heads.readers)
            found[heads.name if heads.name not in found else heads.readers[0]] = heads
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no attention, so there are no heads")
    return found


def _heads(model: nn.Module, structure: Structure, attention: Attention) -> Units:
    axes = [structure.axes[part.name][part.dim] for part in attention.o]
    held = [len(set(attention.heads) & set(leaves(axis))) for axis in axes]  # others read KV heads, or are another layer's
    readers = [part for part, count in zip(attention.o, held, strict=True) if count == max(held)]
    name, axis = innermost([part.name for part in (*attention.q, *readers)]), axes[held.index(max(held))]
    query = tuple(leaf for leaf in dict.fromkeys(leaves(axis)) if leaf in attention.heads)
    kinds = {group.leaf: group.kind for group in structure.groups}
    made = {leaf for part in (*attention.k, *attention.v) for leaf in leaves(structure.axes[part.name][part.dim])}
    own = made if made & set(query) else set(query)  # heads that other attentions count along may be fewer here
    kv = tuple(leaf for leaf in query if kinds.get(leaf) != "query_head" and leaf in own)
    keys = along(axis, query)
    there = np.flatnonzero((keys >= 0).any(1))  # other positions belong to no head, as of a convolution next to the attention
    numbers, first = _number(keys[there])
    if len(set(np.bincount(numbers).tolist())) > 1:
        raise ValueError(f"model: the heads of {name} cannot be told apart: they would not be of one size")
    index = np.full(axis.size, -1)
    index[there] = numbers
    kv_of, _ = _number(along(axis, kv)[there[first]])
    modules = tuple(dict.fromkeys(_reader(model, part.name) for part in readers))
    members = tuple(_members(structure.groups, query, name))
    return Units("head", name, modules, index, kv_of, query, kv, members)


def _number(keys: Indices) -> tuple[Indices, Indices]:
    """Numbers different rows in the order in which they come first, and returns where that is."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[inverse.reshape(-1)], first[order]


def _members(groups: Sequence[Group], query: Sequence[Axis], name: str) -> list[Member]:
    """Returns the members within a module that hold one of these leaves."""
    own = [member for group in groups if group.leaf in query for member in group.members]
    return list({(m.name, m.dim): m for m in own if m.name.startswith(f"{name}.") and not m.buffer}.values())


def _reader(model: nn.Module, parameter: str) -> str:
    """Returns the module that gets what a parameter reads, its own or the layer of adapters around it; refuses one not called."""
    path = parameter.split(".")[:-1]
    if len(path) > 1 and isinstance(model.get_submodule(".".join(path[:-1])), nn.MultiheadAttention):
        raise ValueError(f"model: {parameter} is read by torch.nn.MultiheadAttention at once, so no gate can stand before it")
    for end in range(len(path) - 1, max(len(path) - 4, 0), -1):
        if is_adapter(model.get_submodule(".".join(path[:end]))):
            return ".".join(path[:end])
    return ".".join(path)
