"""Rows, lines, and plain data of groups and roles."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType

from billhook.display import some, text_table
from billhook.tracing.axes import Axis, factors, find, segments
from billhook.tracing.groups import KINDS, Group, Kind
from billhook.tracing.roles import Part, Roles, consecutive_ranges

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


def tree(axes: Iterable[Axis], groups: Iterable[Group]) -> str:
    """Formats the axes of a parameter: leaves as kind:size, products with *, sums with +."""
    kinds = {group.leaf: group.kind for group in groups}
    return f"[{', '.join(_axis(axis, kinds) for axis in axes)}]"


def _axis(axis: Axis, kinds: dict[Axis, Kind], nested: bool = False) -> str:
    axis = find(axis)
    if axis.op == "leaf":
        label = LABELS.get(kinds[axis], kinds[axis]) if axis in kinds else ""
        return f"{label}:{axis.size}" if label else str(axis.size)
    parts = factors(axis) if axis.op == "product" else segments(axis)
    text = (" * " if axis.op == "product" else " + ").join(_axis(part, kinds, nested=True) for part in parts)
    return f"({text})" if nested else text


def rows_and_notes(groups: Iterable[Group]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Returns the cells of prunable groups, under `HEAD`, and a note on each other group."""
    rows = list[tuple[str, ...]]()
    notes = list[tuple[str, str]]()
    for similar in fold_groups(groups):
        first = similar[0]
        size = f"{similar[0].size:,}"
        name = NAMES.get(first.kind, first.kind)
        amount = f"{len(similar)} x {size}" if len(similar) > 1 else size
        if first.reason:
            notes.append(("not pruned", f"{name} ({amount}, {_where(first, 2)}): {first.reason}"))
        else:
            rows.append((name, amount, f"{first.entries:,}", f"{first.bytes:,}", _where(first)))
    return rows, notes


def labeled_notes(notes: Iterable[tuple[str, str]]) -> RenderableType:
    """Formats lines under a table, each with its label in front."""
    return text_table([(f"{label:<12}", text) for label, text in notes], aligns="<")


def name_pattern(name: str) -> str:
    """Returns a parameter's name with * for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def fold_groups(groups: Iterable[Group]) -> list[list[Group]]:
    """Folds groups that differ only in the numbers of their names, in the order of kinds."""
    similar = defaultdict(list)
    for group in groups:
        members = tuple(sorted({(name_pattern(member.name), member.dim) for member in group.members}))
        similar[group.kind, group.size, members, name_pattern(group.reason)].append(group)
    return sorted(similar.values(), key=lambda folded: (bool(folded[0].reason), KINDS.index(folded[0].kind)))


def _where(group: Group, most: int = 4) -> str:
    """Returns the common module of all members and the shortest distinct name endings."""
    names = list(dict.fromkeys(name_pattern(m.name).removesuffix(".weight").removesuffix(".bias") for m in group.members))
    if len(names) == 1:
        return names[0]
    shared = f"{name_pattern(group.where + '.')[:-1]}: " if group.where else ""
    return shared + some(_endings(names), most)


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


def role_line(roles: Roles) -> str:
    """Returns the parts by role, with the shortest distinct endings of their names."""
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


def roles_to_json(roles: Roles) -> dict[str, list[dict[str, Any]]]:
    """Returns the parts by role as plain data."""
    plain = dict[str, list[dict[str, Any]]]()
    for role, parts in roles.items():
        plain[role] = []
        for part in parts:
            positions = list(map(list, consecutive_ranges(part.positions)))
            plain[role].append({"name": part.name, "dim": part.dim, "size": part.size, "positions": positions})
    return plain
