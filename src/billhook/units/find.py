"""Finds the units of a model of any kind, and reads which of them somebody has chosen."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.arguments import annotated, one_of
from billhook.model.find import find_transformer
from billhook.model.handed import Indices
from billhook.model.linears import is_adapter, is_convolution
from billhook.tracing.axes import Axis, leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member, innermost
from billhook.tracing.roles import Attention
from billhook.tracing.trace import Inputs, trace
from billhook.units.blocks import find_blocks
from billhook.units.units import Per, UnitKind, Units, along, plural

Chosen = Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]] | Mapping[int | str, Iterable[int]] | Iterable[int]
"""Units by place: its name, or its number in the order in which `find_units` gives places; or those of the only place."""


def find_units(model: nn.Module, kind: UnitKind | Iterable[UnitKind], example_inputs: Inputs | None = None) -> dict[str, Units]:
    """Finds the units of a model: heads, channels, residual channels, experts or blocks.

    A place is named after the innermost module that holds it; the second of one name gets its kind added.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one; any module with `example_inputs`.
        kind: `"head"`, `"channel"` (of feed-forwards in blocks), `"residual"`, `"expert"` or `"block"`, or several of them.
        example_inputs: Inputs of the forward, as `trace` takes them; by default guessed from the config.

    Returns:
        By place: each attention, feed-forward, stream, mixture or stack of blocks, in the order in which they run.

    Raises:
        ValueError: If a kind is not legal, there are no such units, or heads cannot be told apart.

    Example:
        >>> import billhook as bh
        >>> heads = bh.find_units(bh.load("tiny"), "head")
        >>> [one.count() for one in heads.values()]
        [8, 8, 8, 8]
    """
    annotated(find_units, locals())
    kinds = kinds_of(kind)
    subject = model if example_inputs is not None else find_transformer(model)
    stacks = _stacks(subject, example_inputs) if "block" in kinds else {}
    traced = [one for one in kinds if one != "block"]
    structure = trace(subject, example_inputs) if traced else None
    found = units_of(subject, structure, traced) | stacks if structure is not None else stacks
    check_any(subject, structure, found, kinds)
    return found


def kinds_of(kind: UnitKind | Iterable[UnitKind]) -> list[UnitKind]:
    """Returns one or several kinds as a list, each once; refuses others."""
    kinds: list[UnitKind] = list(dict.fromkeys([kind] if isinstance(kind, str) else kind))
    for one in kinds:
        one_of("kind", one, UnitKind)
    return kinds


def check_any(model: nn.Module, structure: Structure | None, units: Mapping[str, Units], kinds: Collection[UnitKind]) -> None:
    """Refuses a model without any units of some kinds."""
    if not units:
        why = "".join(why_none(model, structure, kind) for kind in kinds) if structure is not None else ""
        raise ValueError(f"model: {type(model).__name__} has no {plural(kinds)}{why}")


def check_held(model: nn.Module, units: Mapping[str, Units]) -> None:
    """Refuses units of another model: whose modules this one does not have."""
    held = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for place, one in units.items():
        for name in [one.name] if one.kind == "block" else one.readers:
            if name not in held:
                raise ValueError(
                    f"units: {name} of {place} is no module of this {type(model).__name__}: give those of find_units"
                )


def units_of(model: nn.Module, structure: Structure, kinds: Iterable[UnitKind]) -> dict[str, Units]:
    """Finds the units of a traced model, none if there are none of a kind; refuses heads that cannot be told apart."""
    found: dict[str, Units] = {}
    for kind in kinds:
        if kind == "head":
            found |= find_heads(model, structure) if structure.attention else {}
            continue
        for one in find_channels(model, structure, kind):
            name = one.name if one.name not in found else f"{one.name} {kind}s"
            found[name if name not in found else f"{name} {len(found)}"] = one
    return found


def of_kind(units: Mapping[str, Units], *kinds: UnitKind) -> dict[str, Units]:
    """Returns the units of some kinds."""
    return {name: one for name, one in units.items() if one.kind in kinds}


def numbered(units: Mapping[str, Units], chosen: Chosen, per: Per = "head") -> dict[str, list[int]]:
    """Returns chosen units by the name of their place, ascending and each once; KV heads as their query heads."""
    one_of("per", per, Per)
    names, what = list(units), plural(one.kind for one in units.values())
    order = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if not isinstance(chosen, Mapping):
        if len(names) > 1:
            raise ValueError(f"{what}: say of which place, as {{place: [numbers]}}; there are {order}")
        chosen = {names[0]: chosen}
    found: dict[str, list[int]] = {}
    for place, given in chosen.items():
        known = place in units if isinstance(place, str) else type(place) is int and 0 <= place < len(names)
        if not known:
            raise ValueError(f"{what}: there is no place {place!r}; there are 0 to {len(names) - 1}, in this order: {order}")
        if not isinstance(given, Iterable):
            raise ValueError(f"units={{{place!r}: {given!r}}} must say the numbers of a place, as in {{{place!r}: [0]}}")
        name, numbers = place if isinstance(place, str) else names[place], list(given)
        one, count = units[name], units[name].count(per)
        if wrong := [number for number in numbers if type(number) is not int or not 0 <= number < count]:
            single = "KV head" if one.kind == "head" and per == "kv_head" else one.kind
            raise ValueError(f"{what}: {name} has no {single} {wrong[0]!r}; it has 0 to {count - 1}")
        if per == "kv_head":
            numbers = one.query_heads(numbers)
        found[name] = sorted({*found.get(name, []), *numbers})
    return found


def _stacks(model: nn.Module, example_inputs: Inputs | None) -> dict[str, Units]:
    """Returns the stacks of blocks as units, which are modules and not positions of tensors."""
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise ValueError("example_inputs: blocks are found by a run that takes them by name: give a dictionary")
    empty = np.zeros(0, dtype=np.int64)
    stacks = find_blocks(model, example_inputs)
    return {name: Units("block", name, (), empty, np.arange(len(stack)), (), (), ()) for name, stack in stacks.items()}


def find_channels(model: nn.Module, structure: Structure, kind: UnitKind) -> list[Units]:
    """Finds the feed-forward channels (in blocks), residual channels or experts of a traced model."""
    groups = [group for group in structure.groups if group.kind == kind]
    if kind == "channel":
        groups = [group for group in groups if not why_not(model, structure, group)]
    return [_units(model, structure, group, kind) for group in groups]


def why_none(model: nn.Module, structure: Structure, kind: UnitKind) -> str:
    """Says why no channels of a model are those of a feed-forward; empty if there are none at all, or of another kind."""
    groups = [group for group in structure.groups if kind == group.kind == "channel"]
    first = {why_not(model, structure, group): group.where or "the model" for group in reversed(groups)}
    return "".join(f"; those of {where} {reason}" for reason, where in reversed(first.items()) if reason)


def why_not(model: nn.Module, structure: Structure, group: Group) -> str:
    """Says why channels are not those of a feed-forward; empty if they are."""
    own = next((one for one in structure.feed_forward if one.channel is group.leaf), None)
    modules = [_at(model, member.name.split(".")[:-1]) for member in group.members]
    convolutions = [module for module in modules if isinstance(module, nn.modules.conv._ConvNd)]
    if group.size < 2:
        return "are one"
    if own is None:
        return "are not made and read as those of a feed-forward"
    if not _in_block(model, group.where):
        return "are in no block"
    if any(module.groups not in (1, group.size) for module in convolutions):
        return "are made or read by a convolution of several groups"
    mixing = [module for module in convolutions if module.groups == 1]
    if not all(map(is_convolution, mixing)):
        return "are made or read by a convolution that is no plain nn.Conv1d or nn.Conv2d"
    if mixing and (group.reason or "normed" in group.leaf.notes):
        return f"are made or read by a convolution, and {group.reason or 'a norm spans all of them'}"
    if convolutions and (own.gate or len(own.down) > 1):
        return "go through a convolution and a gate, or are read twice, as those of a recurrence"
    return ""


def _units(model: nn.Module, structure: Structure, group: Group, kind: UnitKind) -> Units:
    members = tuple({(m.name, m.dim): m for m in group.members if not m.buffer}.values())
    reading = [
        (name, member) for member in members if member.reads for name in _linears(model, structure, member, kind == "channel")
    ]
    indices = [group.index(member) for _, member in reading]
    alike = [name for (name, _), index in zip(reading, indices, strict=True) if np.array_equal(index, indices[0])]
    once = {id(model.get_submodule(name)): name for name in reversed(alike)}  # one gate for a module in several places
    separate = len(alike) == len(reading) and kind != "expert"
    readers = tuple(name for name in dict.fromkeys(alike) if name in once.values()) if separate else ()
    index = indices[0] if readers else np.zeros(0, dtype=np.int64)
    return Units(kind, group.where, readers, index, np.arange(group.size), (group.leaf,), (group.leaf,), members)


def _linears(model: nn.Module, structure: Structure, member: Member, convolutions: bool) -> list[str]:
    """Returns the linears that get what a parameter reads; an adapter's stands for the layer that it is added to.

    Convolutions that mix all channels are such, too, where they are asked for.
    """
    found = []
    for parameter in [member.name, *(alias for alias, name in structure.tied.items() if name == member.name)]:
        path = parameter.split(".")[:-1]
        outer = next((end for end in range(len(path)) if is_adapter(_at(model, path[:end]))), len(path))
        module = _at(model, path[:outer])
        layer = module.get_base_layer() if is_adapter(module) else module
        if isinstance(layer, nn.Linear | Conv1D) or (convolutions and is_convolution(layer) and layer.groups == 1):
            found.append(".".join(path[:outer]))
    return found


def _at(model: nn.Module, path: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def _in_block(model: nn.Module, name: str) -> bool:
    """Tells whether a module is within one that stands in a list."""
    path = name.split(".")
    return any(isinstance(_at(model, path[:end]), nn.ModuleList) for end in range(len(path)))


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
