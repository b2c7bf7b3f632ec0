"""Tables and plain data of a structure."""

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
    "residual": "hidden dimension",
    "rotary": "rotary frequency",
    "position": "position or type",
    "vocab": "token",
    "fixed": "fixed position",
}
HEAD = "unit", "groups x units", "parameters", "bytes", "of each unit, in"


def tree(structure: StructureFields, name: str) -> str:
    """Formats the axes of a parameter: leaves as kind:size, products with *, sums with +."""
    kinds = {group.leaf: group.kind for group in structure.groups}
    return f"[{', '.join(_axis(axis, kinds) for axis in structure.axes[name])}]"


def _axis(axis: Axis, kinds: dict[Axis, Kind], nested: bool = False) -> str:
    axis = find(axis)
    if axis.op == "leaf":
        label = LABELS.get(kinds[axis], kinds[axis]) if axis in kinds else ""
        return f"{label}:{axis.size}" if label else str(axis.size)
    parts = factors(axis) if axis.op == "product" else segments(axis)
    text = (" * " if axis.op == "product" else " + ").join(_axis(part, kinds, nested=True) for part in parts)
    return f"({text})" if nested else text


def table(structure: StructureFields, groups: Sequence[Group]) -> list[RenderableType]:
    """Returns a row per set of similar groups, with roles and warnings below."""
    rows, notes = _rows(groups), _notes(structure, groups)
    entries = sum(math.prod(shape) for shape in structure.shapes.values())
    lines: list[RenderableType] = [f"{structure.model}: {entries:,} parameters in {len(structure.shapes)} tensors"]
    if rows:
        lines += ["", text_table(rows, HEAD, aligns="<>>><")]
    elif not groups:
        lines += ["", "no such units"]
    return [*lines, "", labeled_notes(notes)] if notes else lines


def _rows(groups: Iterable[Group]) -> list[tuple[str, ...]]:
    """Returns the cells of prunable groups, under `HEAD`."""
    rows = list[tuple[str, ...]]()
    for similar in fold_groups(groups):
        first = similar[0]
        if not first.reason:
            rows.append((kind_name(first), _amount(similar), f"{first.entries:,}", f"{first.bytes:,}", _where(first)))
    return rows


def _notes(structure: StructureFields, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Returns groups that are not prunable; for the whole structure, also roles and warnings."""
    notes = []
    for similar in fold_groups(groups):
        first = similar[0]
        if first.reason:
            notes.append(("not pruned", f"{kind_name(first)} ({_amount(similar)}, {_where(first, 2)}): {first.reason}"))
    if len(groups) < len(structure.groups):
        return notes
    lines = Counter[tuple[str, str]]()  # similar layers share a line
    for layer in structure.attention:
        lines["attention", _role_line(layer.roles)] += 1
    for mlp in structure.feed_forward:
        lines["MLP", _role_line(mlp.roles)] += 1
    notes = [*((label, f"{line} ({times}x)") for (label, line), times in lines.items()), *notes]
    notes += [("tied", f"{alias} is {name}") for alias, name in structure.tied.items()]
    if structure.untouched:
        notes.append(("never used", _some(structure.untouched)))
    for label, counts in (("opaque", structure.opaque), ("assumed", structure.assumed)):
        notes += [(label, f"{reason} ({times}x)") for reason, times in counts.items()]
    return notes


def labeled_notes(notes: Iterable[tuple[str, str]]) -> RenderableType:
    """Formats lines under a table, each with its label in front."""
    return text_table([(f"{label:<12}", text) for label, text in notes], aligns="<")


def name_pattern(name: str) -> str:
    """Returns a parameter's name with * for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def fold_groups(groups: Iterable[Group]) -> list[list[Group]]:
    """Folds groups that differ only in the numbers of their names, in the order of kinds."""
    similar: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        members = tuple(sorted({(name_pattern(member.name), member.dim) for member in group.members}))
        similar.setdefault((group.kind, group.size, members, name_pattern(group.reason)), []).append(group)
    return sorted(similar.values(), key=lambda folded: (bool(folded[0].reason), KINDS.index(folded[0].kind)))


def kind_name(group: Group) -> str:
    """Returns the display name of a group's units."""
    return NAMES.get(group.kind, group.kind)


def _amount(similar: Sequence[Group]) -> str:
    return f"{len(similar)} x {similar[0].size:,}" if len(similar) > 1 else f"{similar[0].size:,}"


def _where(group: Group, most: int = 4) -> str:
    """Returns the common module of all members and the shortest distinct name endings."""
    names = list(dict.fromkeys(name_pattern(m.name).removesuffix(".weight").removesuffix(".bias") for m in group.members))
    if len(names) == 1:
        return names[0]
    shared = f"{name_pattern(group.where + '.')[:-1]}: " if group.where else ""
    return shared + _some(_endings(names), most)


def _endings(names: Sequence[str]) -> list[str]:
    """Returns the shortest ending of each name that is unique among them."""
    parts = [name.split(".") for name in names]
    ends = []
    for name in parts:
        length = 1
        while length < len(name) and sum(other[-length:] == name[-length:] for other in parts) > 1:
            length += 1
        ends.append(".".join(name[-length:]))
    return ends


def _role_line(roles: dict[str, tuple[Part, ...]]) -> str:
    names = list(dict.fromkeys(_plain(part) for parts in roles.values() for part in parts))
    ends = dict(zip(names, _endings(names), strict=True))
    lines = []
    for role, parts in roles.items():
        if parts:
            named = [ends[_plain(part)] + str(part).removeprefix(part.name) for part in parts]
            lines.append(f"{role} = {', '.join(named)}")
    return "; ".join(lines)


def _plain(part: Part) -> str:
    return name_pattern(part.name).removesuffix(".weight")


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def to_json(structure: StructureFields) -> dict[str, Any]:
    """Returns a structure as lists, dictionaries, numbers, and strings."""
    parameters = {}
    for name, shape in structure.shapes.items():
        if name in structure.axes:
            parameters[name] = {"shape": list(shape), "axes": tree(structure, name)}
    return {
        "model": structure.model,
        "parameters": parameters,
        "groups": list(map(group_to_json, structure.groups)),
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
