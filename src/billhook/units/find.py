"""Finds the units of a model, and resolves chosen unit numbers."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise, starmap

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.arguments import check_one_of, check_types
from billhook.engine import cpu_by_default
from billhook.linalg import Indices
from billhook.model import find_transformer, is_adapter, is_convolution, stacks_of
from billhook.tracing.axes import leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, common_module
from billhook.tracing.roles import Attention
from billhook.tracing.trace import Inputs, trace
from billhook.units.blocks import find_blocks
from billhook.units.units import Per, UnitKind, UnitNumbers, Units, UnitsByModule, axis_numbers, plural

Chosen = Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]] | Mapping[int | str, Iterable[int]] | Iterable[int]
"""Unit numbers by module name or position in `find_units`, or unit numbers of the only module."""


@cpu_by_default()
def find_units(model: nn.Module, kind: UnitKind | Iterable[UnitKind], example_inputs: Inputs | None = None) -> dict[str, Units]:
    """Finds the units of a model: heads, channels, experts, tokens, blocks, ...

    A module is named by the innermost module with the units. If a name occurs twice, the kind is appended.

    Args:
        model: A Hugging Face model, also with LoRA, or a module that contains one. Any module with `example_inputs`.
        kind: `"head"`, `"channel"` (of MLPs in blocks), `"residual"`, `"expert"`, `"token"`, or `"block"`, or a list of kinds.
        example_inputs: Inputs of the forward, as for `trace`. Defaults to inputs guessed from the config.

    Returns:
        Units by module, in execution order: attention, MLP, residual stream, mixture of experts, or block stack.

    Raises:
        ValueError: If a kind is invalid, if there are no such units, or if heads cannot be distinguished.

    Example:
        >>> import billhook as bh
        >>> heads = bh.find_units(bh.load("tiny"), "head")
        >>> [layer.count() for layer in heads.values()]
        [8, 8, 8, 8]
    """
    check_types(find_units, locals())
    kinds = kinds_of(kind)
    subject = model if example_inputs is not None else find_transformer(model)
    traced = [kind for kind in kinds if kind != "block"]
    structure = trace(subject, example_inputs) if traced else None
    units = units_of(subject, structure, traced) if structure is not None else {}
    if "block" in kinds:  # which are modules, and not positions of tensors
        if example_inputs is not None and not isinstance(example_inputs, Mapping):
            raise ValueError("example_inputs: blocks are found by a run that takes them by name: give a dictionary")
        none = np.zeros(0, dtype=np.int64)
        for name, stack in find_blocks(subject, example_inputs).items():
            units[name] = Units("block", name, (), none, np.arange(len(stack)), (), (), ())
    check_any(subject, structure, units, kinds)
    return units


def kinds_of(kind: UnitKind | Iterable[UnitKind]) -> list[UnitKind]:
    """Returns the kinds as a list without duplicates. Raises for other values."""
    kinds = list(dict.fromkeys([kind] if isinstance(kind, str) else kind))
    for legal in kinds:
        check_one_of("kind", legal, UnitKind)
    return kinds


def check_any(model: nn.Module, structure: Structure | None, units: UnitsByModule, kinds: Collection[UnitKind]) -> None:
    """Raises for a model without units of some kinds."""
    if not units:
        why = "".join(why_none(model, structure, kind) for kind in kinds) if structure is not None else ""
        raise ValueError(f"model: {type(model).__name__} has no {plural(kinds)}{why}")


def check_belongs(model: nn.Module, units: UnitsByModule) -> None:
    """Raises for units of another model."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for module, layer in units.items():
        for name in [layer.name] if layer.kind == "block" else layer.readers:
            if name not in modules:
                raise ValueError(
                    f"units: {name} of {module} is not a module of this {type(model).__name__}. Pass units from bh.find_units."
                )


def units_of(model: nn.Module, structure: Structure, kinds: Iterable[UnitKind]) -> dict[str, Units]:
    """Returns the units of a traced model, or raises if heads cannot be distinguished."""
    units: dict[str, Units] = {}
    for kind in kinds:
        group_kind = "vocab" if kind == "token" else kind
        if kind == "head":
            units |= find_heads(model, structure) if structure.attention else {}
            continue
        for group in structure.groups:
            # of experts in groups, such as DeepSeek's, units are the places in a group
            outer = kind == "expert" and any(leaves(member.axis)[-1] is not group.leaf for member in group.members)
            if group.kind == group_kind and not outer and not (kind == "channel" and why_not(model, structure, group)):
                name = group.where if group.where not in units else f"{group.where} {kind}s"
                units[name if name not in units else f"{name} {len(units)}"] = _units_of_group(model, structure, group, kind)
    return units


def of_kind(units: UnitsByModule, *kinds: UnitKind) -> dict[str, Units]:
    """Returns the units of some kinds."""
    return {name: layer for name, layer in units.items() if layer.kind in kinds}


def unit_ids(units: UnitsByModule, chosen: Chosen, per: Per = "head") -> UnitNumbers:
    """Returns chosen units by module, sorted and unique. KV heads become query heads."""
    check_one_of("per", per, Per)
    names, what = list(units), plural(layer.kind for layer in units.values())
    order = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if not isinstance(chosen, Mapping):
        if len(names) > 1:
            raise ValueError(f"{what}: numbers without a module, pass {{module: [numbers]}}; there are {order}")
        chosen = {names[0]: chosen}
    result: UnitNumbers = {}
    for module, numbers in chosen.items():
        known = module in units if isinstance(module, str) else type(module) is int and 0 <= module < len(names)
        if not known:
            raise ValueError(f"{what}: there is no module {module!r}; there are 0 to {len(names) - 1}, in this order: {order}")
        if not isinstance(numbers, Iterable):
            raise ValueError(f"units={{{module!r}: {numbers!r}}} must list the numbers of a module, as in {{{module!r}: [0]}}")
        name, numbers = module if isinstance(module, str) else names[module], list(numbers)
        layer, count = units[name], units[name].count(per)
        for number in numbers:
            if type(number) is not int or not 0 <= number < count:
                single = "KV head" if layer.kind == "head" and per == "kv_head" else layer.kind
                raise ValueError(f"{what}: {name} has no {single} {number!r}; it has 0 to {count - 1}")
        if per == "kv_head":
            numbers = layer.query_heads(numbers)
        result[name] = sorted({*result.get(name, []), *numbers})
    return result


def why_none(model: nn.Module, structure: Structure, kind: UnitKind) -> str:
    """Explains why a model has no MLP channels. Empty if there are no other channels either."""
    reasons: dict[str, str] = {}
    for group in structure.groups if kind == "channel" else ():
        if group.kind == "channel":
            reasons.setdefault(why_not(model, structure, group), group.where or "the model")
    return "".join(f"; those of {where} {reason}" for reason, where in reasons.items() if reason)


def why_not(model: nn.Module, structure: Structure, group: Group) -> str:
    """Explains why channels are not MLP channels. Empty if they are."""
    if group.size < 2:
        return "are one"
    feed_forward = next((layer for layer in structure.feed_forward if layer.channel is group.leaf), None)
    if feed_forward is None:
        return "are not made and read as those of an MLP"
    path = group.where.split(".")
    if not any(isinstance(_at(model, path[:end]), nn.ModuleList) for end in range(len(path))):
        return "are in no block"
    convolutions = defaultdict(list)  # by their number of groups
    for member in group.members:
        module = _at(model, member.name.split(".")[:-1])
        if isinstance(module, nn.modules.conv._ConvNd):
            convolutions[module.groups].append(module)
    if convolutions.keys() - {1, group.size}:
        return "are made or read by a convolution of several groups"
    mixing = convolutions.get(1, ())
    if not all(map(is_convolution, mixing)):
        return "are made or read by a convolution that is no plain nn.Conv1d or nn.Conv2d"
    if mixing and (group.reason or "normed" in group.leaf.notes):
        return f"are made or read by a convolution, and {group.reason or 'a norm spans all of them'}"
    if convolutions and (feed_forward.gate or len(feed_forward.down) > 1):
        return "go through a convolution and a gate, or are read twice, as those of a recurrence"
    return ""


def _units_of_group(model: nn.Module, structure: Structure, group: Group, kind: UnitKind) -> Units:
    members = tuple({(m.name, m.dim): m for m in group.members if not m.buffer}.values())
    readers, indices = dict[int, str](), []
    for member in members:
        if member.reads:
            index = group.index(member)
            for parameter in [member.name, *(alias for alias, name in structure.tied.items() if name == member.name)]:
                name = _reader(model, parameter)
                module = model.get_submodule(name)
                layer = module.get_base_layer() if is_adapter(module) else module
                mixes = kind == "channel" and is_convolution(layer) and layer.groups == 1
                if isinstance(layer, nn.Linear | Conv1D) or mixes:
                    readers.setdefault(id(module), name)  # a single gate for a shared module
                    indices.append(index)
    if kind == "expert" or not all(starmap(np.array_equal, pairwise(indices))):
        readers.clear()
    names = tuple(readers.values())
    experts = {member.name.rpartition(".")[0] for member in members}
    of_experts = kind == "channel" and len(experts) == 1 and bool(stacks_of(module := model.get_submodule(min(experts))))
    if of_experts:
        names = tuple(f"{min(experts)}.{number}.down_proj" for number in range(len(module.get_parameter("down_proj"))))
        indices = [group.index(member) for member in members if member.name.endswith(".down_proj")]
    index = indices[0] if names else np.zeros(0, dtype=np.int64)
    return Units(kind, group.where, names, index, np.arange(group.size), (group.leaf,), (group.leaf,), members, of_experts)


def _reader(model: nn.Module, parameter: str) -> str:
    """Returns the consumer module of a parameter: its own, or the adapter layer around it."""
    path = parameter.split(".")[:-1]
    return ".".join(next((path[:end] for end in range(len(path)) if is_adapter(_at(model, path[:end]))), path))


def _at(model: nn.Module, path: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def find_heads(model: nn.Module, structure: Structure) -> dict[str, Units]:
    """Returns the heads of attention modules in call order; raises for none or unclear ones."""
    layers = {}
    seen = set()
    for attention in structure.attention:
        heads = _heads(model, structure, attention)
        if heads.readers not in seen:
            seen.add(heads.readers)
            layers[heads.name if heads.name not in layers else heads.readers[0]] = heads
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no attention, so there are no heads")
    return layers


def _heads(model: nn.Module, structure: Structure, attention: Attention) -> Units:
    by_leaves = defaultdict(list)
    for part in attention.o:
        axis = structure.axes[part.name][part.dim]
        by_leaves[len(set(attention.heads) & set(leaves(axis)))].append(part)
    consumers = by_leaves[max(by_leaves)]  # others read KV heads, or belong to another layer
    axis = structure.axes[consumers[0].name][consumers[0].dim]
    name = common_module([part.name for part in (*attention.q, *consumers)])
    query = tuple(leaf for leaf in dict.fromkeys(leaves(axis)) if leaf in attention.heads)
    made = set()  # leaves that count KV heads, which are among those that count query heads
    for part in (*attention.k, *attention.v):
        made.update(leaves(structure.axes[part.name][part.dim]))
    counted = made if made & set(query) else set(query)  # heads that other attention modules count may be fewer here
    kinds = {group.leaf: group.kind for group in structure.groups}
    kv = tuple(leaf for leaf in query if kinds.get(leaf) != "query_head" and leaf in counted)
    keys = axis_numbers(axis, query)
    in_heads = np.flatnonzero((keys >= 0).any(1))  # other positions belong to no head, such as of a parallel convolution
    numbers, first = _number(keys[in_heads])
    if len(set(np.bincount(numbers).tolist())) > 1:
        raise ValueError(f"model: the heads of {name} cannot be distinguished, because their sizes would differ.")
    index = np.full(axis.size, -1)
    index[in_heads] = numbers
    kv_of, _ = _number(axis_numbers(axis, kv)[in_heads[first]])
    modules: dict[str, None] = {}
    for part in consumers:
        path = part.name.split(".")[:-1]
        if len(path) > 1 and isinstance(_at(model, path[:-1]), nn.MultiheadAttention):
            raise ValueError(f"model: {part.name} is read by torch.nn.MultiheadAttention at once, so no gate can stand before it")
        modules[_reader(model, part.name)] = None
    members = {}
    for group in structure.groups:
        for member in group.members if group.leaf in query else ():
            if member.name.startswith(f"{name}.") and not member.buffer:
                members[member.name, member.dim] = member
    return Units("head", name, tuple(modules), index, kv_of, query, kv, tuple(members.values()))


def _number(keys: Indices) -> tuple[Indices, Indices]:
    """Numbers distinct rows in order of appearance, and returns their first positions."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[inverse.reshape(-1)], first[order]
