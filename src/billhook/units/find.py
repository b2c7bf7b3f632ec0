"""Finds the units of a model of any kind, and reads which of them somebody has chosen."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from torch import nn

from billhook.arguments import annotated, one_of
from billhook.model.find import find_transformer
from billhook.tracing.coupling import Structure
from billhook.tracing.trace import Inputs, trace
from billhook.units.blocks import find_blocks
from billhook.units.channels import find_channels, why_none
from billhook.units.heads import find_heads
from billhook.units.units import Per, UnitKind, Units, plural

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
