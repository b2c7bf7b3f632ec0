"""The heads of a model, as whoever reads them sees them: which positions of its input are which head."""

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from billhook.model.find import find_transformer
from billhook.model.handed import Indices
from billhook.tracing.axes import Axis, leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member, innermost
from billhook.tracing.roles import Attention
from billhook.tracing.trace import Inputs, trace
from billhook.units.units import Per, Units, along

Layer = int | str
"""An attention: its name, or its place in the order in which they run, from 0; where each layer has one, that is the layer."""

Chosen = Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]] | Mapping[Layer, Iterable[int]]
"""Heads by layer."""


def find_heads(model: nn.Module, structure: Structure | None = None, example_inputs: Inputs | None = None) -> dict[str, Units]:
    """The heads of every attention of a model, by the attention's name, in the order in which they run.

    Args:
        model: A Hugging Face model, a module that holds one, or with `example_inputs` any module.
        structure: What `trace` has found of it; by default it is traced.
        example_inputs: As in `trace`.

    Raises:
        ValueError: If it has no attention, or one whose heads no module of its own reads, or that cannot be told apart.
    """
    subject = model if example_inputs is not None else find_transformer(model)
    structure = structure or trace(subject, example_inputs)
    found: dict[str, Units] = {}
    seen: set[tuple[str, ...]] = set()
    for attention in structure.attention:
        heads = _heads(subject, structure, attention)
        if heads.readers not in seen:
            seen.add(heads.readers)
            found[heads.name if heads.name not in found else heads.readers[0]] = heads
    if not found:
        raise ValueError(f"model: {type(subject).__name__} has no attention, so there are no heads")
    return found


def check_layers(heads: Mapping[str, Units], chosen: Chosen, per: Per = "head") -> dict[str, list[int]]:
    """Heads by the names of their attentions.

    Raises:
        ValueError: If there is no such attention or head; the message says which there are.
    """
    if per not in get_args(Per):
        raise ValueError(f"per={per!r} must be one of {', '.join(get_args(Per))}")
    names, named = list(heads), dict[str, list[int]]()
    for layer, given in chosen.items():
        numbers = list(given)
        known = layer in heads if isinstance(layer, str) else type(layer) is int and 0 <= layer < len(names)
        if not known:
            raise ValueError(
                f"heads: there is no layer {layer!r}; there are 0 to {len(names) - 1}, in this order: {', '.join(names[:4])}"
                + (", ..." if len(names) > 4 else "")
            )
        name = layer if isinstance(layer, str) else names[layer]
        count = heads[name].count(per)
        if wrong := [number for number in numbers if type(number) is not int or not 0 <= number < count]:
            raise ValueError(f"heads: layer {layer!r} has no head {wrong[0]!r}; it has 0 to {count - 1}")
        named[name] = sorted({*named.get(name, []), *numbers})
    return named


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
    there = np.flatnonzero((keys >= 0).any(1))  # elsewhere stands what no head gives, as a convolution beside the attention
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
    """Numbers different rows in the order in which they come first, and where that is."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[inverse.reshape(-1)], first[order]


def _members(groups: Sequence[Group], query: Sequence[Axis], name: str) -> list[Member]:
    """What holds one of these leaves, within a module."""
    own = [member for group in groups if group.leaf in query for member in group.members]
    return list({(m.name, m.dim): m for m in own if m.name.startswith(f"{name}.") and not m.buffer}.values())


def _reader(model: nn.Module, parameter: str) -> str:
    """The module that gets what a parameter reads: its own, or the layer of adapters around it.

    Raises:
        ValueError: If it has none that is called.
    """
    path = parameter.split(".")[:-1]
    if len(path) > 1 and isinstance(model.get_submodule(".".join(path[:-1])), nn.MultiheadAttention):
        raise ValueError(f"model: {parameter} is read by torch.nn.MultiheadAttention at once, so no gate can stand before it")
    for end in range(len(path) - 1, max(len(path) - 4, 0), -1):
        if isinstance(model.get_submodule(".".join(path[:end])), BaseTunerLayer):
            return ".".join(path[:end])
    return ".".join(path)
