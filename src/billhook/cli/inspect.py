"""`billhook inspect`: coupled units of a model, and what can be pruned, converted and saved; no weights are read."""

import json as json_format
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from billhook.arguments import one_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.kv_heads.scope import kv_heads_of
from billhook.model.meta import from_name
from billhook.tracing.groups import Group, Kind
from billhook.tracing.show import fold, kind_name, labelled
from billhook.tracing.trace import trace
from billhook.units.fields import SHOWN, FieldFinder

CHOICES: dict[str, tuple[Kind, ...]] = {
    "heads": ("kv_head", "query_head", "head"),
    "channels": ("channel",),
    "residual": ("residual",),
    "experts": ("expert",),
    "ranks": ("rank",),
    "dimensions": ("query_key", "value", "rotary", "state"),
    "tables": ("vocab", "position", "label"),
    "fixed": ("fixed",),
}


def inspect(model: str, group: str | None = None, json: bool = False) -> None:
    """Prints the coupled units of a model, where they are, and what can be pruned, converted and saved.

    Only the config is read: no weights are downloaded.

    Args:
        model: A folder, a config.json, a hub name, or "tiny".
        group: Only units of this kind: heads, channels, residual, experts, ranks, dimensions, tables or fixed.
        json: Print everything as JSON.

    Raises:
        ValueError: If there is no such kind, transformers has no such model, or the model cannot be traced.
    """
    if group is not None:
        one_of("group", group, CHOICES)
    shadow = from_name(model)
    structure = trace(shadow)
    groups = [one for one in structure.groups if group is None or one.kind in CHOICES[group]]
    saved = saving(shadow, groups)
    converted = conversion(shadow)
    if json:
        numbers = {one.number: list(fields) for alike, fields in saved for one in alike}
        plain = structure.to_json()
        wanted = {one.number for one in groups}
        plain["groups"] = [
            one | {"config_fields": numbers.get(one["number"], [])} for one in plain["groups"] if one["number"] in wanted
        ]
        print(json_format.dumps(plain | {"conversion": converted}, indent=1))
        return
    print(structure.show(groups))
    lines = _saved_lines(saved, FieldFinder(shadow))
    if group in (None, "heads"):
        lines.append(labelled("converted", converted["says"]))
    if lines:
        print("\n" + "\n".join(lines))


def saving(model: PreTrainedModel, groups: Sequence[Group]) -> list[tuple[list[Group], tuple[str, ...]]]:
    """Finds the config fields that count the units of each kind of group that may be pruned, alike in all layers.

    Without such a field, a model with fewer units is not a plain checkpoint of its family.
    """
    finder = FieldFinder(model)
    alike: dict[tuple[Kind, int], list[Group]] = {}
    for own in fold([group for group in groups if not group.reason]):
        alike.setdefault((own[0].kind, own[0].size), []).extend(own)
    found: list[tuple[list[Group], tuple[str, ...]]] = []
    for own in alike.values():
        parts = [own] if (fields := finder.find(own)) else fold(own)
        found += [(part, fields or finder.find(part)) for part in parts]
    return found


def _saved_lines(saved: Sequence[tuple[list[Group], tuple[str, ...]]], finder: FieldFinder) -> list[str]:
    lines: dict[str, None] = {}
    for alike, fields in saved:
        size = alike[0].size
        how = "fewer make no plain checkpoint: no field of the config counts them"
        if fields:
            how = f"{_numbers(size, finder.counts(size, fields))} make a plain checkpoint, by {', '.join(fields)}"
        lines[labelled("saved", f"{kind_name(alike[0])} ({size:,}): {how}")] = None
    return list(lines)


def _numbers(size: int, legal: Sequence[int]) -> str:
    """Names the legal numbers below a size, given the highest few."""
    if list(legal) == list(range(size - 1, max(size - 1 - SHOWN, 0), -1)):
        return "any fewer"
    *most, last = [f"{number:,}" for number in legal] or ["none"]
    if len(legal) == SHOWN and legal[-1] > 1:
        return f"{', '.join([*most, last])} ..."
    return f"{', '.join(most)} or {last}" if most else last


def conversion(model: PreTrainedModel) -> dict[str, Any]:
    """Finds the numbers of KV heads that a model can be converted to, or why it cannot; `says` is a sentence about that."""
    legal, refused = list[int](), "there is one KV head already"
    try:
        before = kv_heads_of(model)
    except ValueError as error:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {error}"}
    for number in [n for n in range(1, before) if before % n == 0]:
        try:
            plan_kv_heads(model, number)
            legal.append(number)
        except ValueError as error:
            refused = str(error)
    if before > 1 and not legal:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {refused}"}
    says = f"{before} KV heads to {' or '.join(map(str, legal))}" if legal else f"no: {refused}"
    return {"num_key_value_heads": before, "legal": legal, "says": says}
