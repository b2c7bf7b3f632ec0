"""A structure for people to read, and as plain data."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType

from billhook.display import text_table
from billhook.tracing.axes import Axis, factors, find, segments
from billhook.tracing.groups import KINDS, Group, Kind
from billhook.tracing.roles import Part, StructureFields, consecutive_ranges

LABELS: dict[Kind, str] = {
    "kv_head": "kv",
    "query_head": "group",
    "rotary": "f",
    "residual": "hidden",
    "query_key": "qk",
    "value": "v",
    "fixed": "",
}
NAMES: dict[Kind, str] = {
    "kv_head": "KV head",
    "query_head": "query head per KV head",
    "query_key": "query/key dimension, all heads",
    "value": "value dimension, all heads",
    "residual": "residual channel",
    "rotary": "rotary frequency",
    "position": "position or type",
    "vocab": "token",
    "fixed": "fixed place",
}
HEAD = "unit", "groups x units", "parameters", "bytes", "of each unit, in"


def tree(structure: StructureFields, name: str) -> str:
    """Shows the axes of a parameter: leaves as kind:size, products with *, sums with +."""
    kinds = {group.leaf: group.kind for group in structure.groups}
    return f"[{', '.join(_axis(axis, kinds) for axis in structure.axes[name])}]"


def _axis(axis: Axis, kinds: dict[Axis, Kind], inside: bool = False) -> str:
    axis = find(axis)
    if axis.op == "leaf":
        label = LABELS.get(kinds[axis], kinds[axis]) if axis in kinds else ""
        return f"{label}:{axis.size}" if label else str(axis.size)
    parts = factors(axis) if axis.op == "product" else segments(axis)
    text = (" * " if axis.op == "product" else " + ").join(_axis(part, kinds, inside=True) for part in parts)
    return f"({text})" if inside else text


def table(structure: StructureFields, groups: Sequence[Group]) -> list[RenderableType]:
    """Shows one row for all groups that are alike except for the layer; below roles, and whatever a reader should know."""
    rows, notes = _rows(groups), _notes(structure, groups)
    entries = sum(math.prod(shape) for shape in structure.shapes.values())
    shown: list[RenderableType] = [f"{structure.model}: {entries:,} parameters in {len(structure.shapes)} tensors"]
    if rows:
        shown += ["", text_table(rows, HEAD, aligns="<>>><")]
    elif not groups:
        shown += ["", "no such units"]
    return [*shown, "", labeled_notes(notes)] if notes else shown


def _rows(groups: Iterable[Group]) -> list[tuple[str, ...]]:
    """Returns the cells of groups that may be pruned, under `HEAD`."""
    rows = list[tuple[str, ...]]()
    for alike in fold_groups(groups):
        first = alike[0]
        if not first.reason:
            rows.append((kind_name(first), _amount(alike), f"{first.entries:,}", f"{first.bytes:,}", _where(first)))
    return rows


def _notes(structure: StructureFields, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Returns what cannot be pruned, with the reason; of the whole structure also roles and warnings."""
    notes = []
    for alike in fold_groups(groups):
        first = alike[0]
        if first.reason:
            notes.append(("not pruned", f"{kind_name(first)} ({_amount(alike)}, {_where(first, 2)}): {first.reason}"))
    return [*_roles(structure), *notes, *_warnings(structure)] if len(groups) == len(structure.groups) else notes


def _warnings(structure: StructureFields) -> list[tuple[str, str]]:
    notes = [("tied", f"{alias} is {name}") for alias, name in structure.tied.items()]
    notes += [("never used", _some(structure.untouched))] if structure.untouched else []
    notes += [("opaque", f"{reason} ({times}x)") for reason, times in structure.opaque.items()]
    return notes + [("assumed", f"{what} ({times}x)") for what, times in structure.assumed.items()]


def labeled_notes(notes: Iterable[Sequence[str]]) -> RenderableType:
    """Makes lines under a table, each with what it is about in front."""
    return text_table([(f"{label:<12}", *texts) for label, *texts in notes], aligns="<")


def name_pattern(name: str) -> str:
    """Returns a parameter's name with a * for every number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def fold_groups(groups: Iterable[Group]) -> list[list[Group]]:
    """Folds groups that differ in nothing but numbers in names, in the order of their kinds."""
    alike: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        members = tuple(sorted({(name_pattern(member.name), member.dim) for member in group.members}))
        alike.setdefault((group.kind, group.size, members, name_pattern(group.reason)), []).append(group)
    return sorted(alike.values(), key=lambda folded: (bool(folded[0].reason), KINDS.index(folded[0].kind)))


def kind_name(group: Group) -> str:
    """Returns the name of a group's units."""
    return NAMES.get(group.kind, group.kind)


def _amount(alike: Sequence[Group]) -> str:
    return f"{len(alike)} x {alike[0].size:,}" if len(alike) > 1 else f"{alike[0].size:,}"


def _where(group: Group, most: int = 4) -> str:
    """Names what all members are in, and the modules they are, by the shortest endings that tell them apart."""
    names = list(dict.fromkeys(name_pattern(m.name).removesuffix(".weight").removesuffix(".bias") for m in group.members))
    if len(names) == 1:
        return names[0]
    shared = f"{name_pattern(group.where + '.')[:-1]}: " if group.where else ""
    return shared + _some(_endings(names), most)


def _endings(names: Sequence[str]) -> list[str]:
    """Returns as many parts from the end of each name as tell it from all others."""
    parts = [name.split(".") for name in names]
    ends = []
    for name in parts:
        length = next((n for n in range(1, len(name)) if sum(other[-n:] == name[-n:] for other in parts) == 1), len(name))
        ends.append(".".join(name[-length:]))
    return ends


def _roles(structure: StructureFields) -> list[tuple[str, str]]:
    """Shows query, key, value and output, gate, up and down; layers that are alike on one line."""
    lines = [("attention", _role_line(layer.roles)) for layer in structure.attention]
    lines += [("feed-forward", _role_line(layer.roles)) for layer in structure.feed_forward]
    return [(what, f"{line} ({times}x)") for (what, line), times in Counter(lines).items()]


def _role_line(roles: dict[str, tuple[Part, ...]]) -> str:
    names = list(dict.fromkeys(_plain(part) for parts in roles.values() for part in parts))
    ends = dict(zip(names, _endings(names), strict=True))
    shown = []
    for role, parts in roles.items():
        if parts:
            named = [ends[_plain(part)] + str(part).removeprefix(part.name) for part in parts]
            shown.append(f"{role} = {', '.join(named)}")
    return "; ".join(shown)


def _plain(part: Part) -> str:
    return name_pattern(part.name).removesuffix(".weight")


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def to_json(structure: StructureFields) -> dict[str, Any]:
    """Returns everything as lists, dictionaries, numbers and strings."""
    used = {name: shape for name, shape in structure.shapes.items() if name in structure.axes}
    return {
        "model": structure.model,
        "parameters": {name: {"shape": list(shape), "axes": tree(structure, name)} for name, shape in used.items()},
        "groups": [group_to_json(group) for group in structure.groups],
        "attention": [_roles_to_json(layer.roles) for layer in structure.attention],
        "feed_forward": [_roles_to_json(layer.roles) for layer in structure.feed_forward],
        "tied": structure.tied,
        "untouched": list(structure.untouched),
        "opaque": structure.opaque,
        "assumed": structure.assumed,
    }


def group_to_json(group: Group) -> dict[str, Any]:
    """Returns a group as plain data."""
    return {
        "number": group.number,
        "kind": group.kind,
        "size": group.size,
        "where": group.where,
        "prunable": not group.reason,
        "reason": group.reason,
        "flags": group.flags,
        "context": list(group.context),
        "parameters_per_unit": group.entries,
        "bytes_per_unit": group.bytes,
        "members": [{"name": m.name, "dim": m.dim, "reads": m.reads} for m in group.members],
    }


def _roles_to_json(roles: dict[str, tuple[Part, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {role: [_part(part) for part in parts] for role, parts in roles.items()}


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "dim": part.dim,
        "size": part.size,
        "positions": [list(s) for s in consecutive_ranges(part.positions)],
    }
