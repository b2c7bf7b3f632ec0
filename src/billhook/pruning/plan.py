"""Which units are removed from a model, as a plan."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text
from torch import nn
from typing_extensions import Self

from billhook.display import text_table
from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.model.costs import Costs
from billhook.model.find import find_transformer
from billhook.model.plan import ShapePlan, Weights, with_weights
from billhook.model.surgery import UpdateOptimizers, update_optimizers
from billhook.pruning.amount import RowLength, divides_among_devices, row_lengths_from_json, uneven_devices_note
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.removal import remove
from billhook.tracing.show import name_pattern
from billhook.tracing.trace import trace
from billhook.units.find import units_of
from billhook.units.units import PLURAL, UnitKind, count_text, counts


@dataclass(frozen=True, eq=False, repr=False)
class UnitPlan(Cut, ShapePlan):
    """Which heads, channels, residual channels or experts are removed, and what the model costs then; `print` shows a table."""

    kind: ClassVar[str] = "units"
    costs: tuple[Costs, Costs] | None = None
    rows: tuple[RowLength, ...] = ()

    @classmethod
    def of(cls, cut: Cut, costs: tuple[Costs, Costs] | None = None, rows: tuple[RowLength, ...] = ()) -> Self:
        """Makes a plan of what has been found."""
        return cls(**vars(cut), costs=costs, rows=rows)

    @property
    def words(self) -> str:
        """How many units of each kind are removed, in words."""
        numbers: dict[UnitKind, list[int]] = {}
        for name, removed in self.units.items():
            numbers.setdefault(self.kinds[name], []).append(len(removed))
        words = []
        for kind in dict.fromkeys(self.kinds.values()):
            if kind in numbers:
                count, module = len(numbers[kind]), "attention module" if kind == "head" else "module"
                where = f" in {count:,} {module}{'s' * (count != 1)}"
                one_stream = kind == "residual" and count == 1
                words.append(f"{count_text(kind, sum(numbers[kind]))}{'' if one_stream else where}")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; see `ModelPlan.to_json`."""
        return {
            "kind": self.kind,
            "model": self.model,
            "kinds": dict(self.kinds),
            "units": {name: list(removed) for name, removed in self.units.items()},
            "before": {name: list(numbers) for name, numbers in self.before.items()},
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        parts = ("model", "kinds", "units", "before")
        if not all(part in plain for part in parts):
            raise ValueError(f"plan: a mapping with {', '.join(parts)} is needed, as to_json returns it")
        for part in parts[1:]:
            is_legal = _is_kind if part == "kinds" else _is_list
            if not isinstance(plain[part], Mapping) or not all(map(is_legal, plain[part].values())):
                raise ValueError(f"plan: {part} is {str(plain[part])[:80]!r}, and must be as to_json returns it")
        before = {name: tuple(numbers) for name, numbers in plain["before"].items()}
        rows = row_lengths_from_json(plain.get("rows", []))
        return cls.of(_find_again(plain["model"], plain["kinds"], before, plain["units"], find_transformer(model)), rows=rows)

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that the plan was not made for; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        now = _find_again(self.model, self.kinds, self.before, self.units, subject).cuts
        if now.keys() != self.cuts.keys() or any(not np.array_equal(stays, now[key]) for key, stays in self.cuts.items()):
            raise ValueError(
                f"plan: it was made for a {self.model} with other units than this {type(subject).__name__} has (its tensors hold "
                "others)"
            )

    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Removes the units; see `ShapePlan.change`."""
        subject = find_transformer(model)
        check_kinds(subject, self.kinds.values())
        with with_weights(subject, weights):
            return partial(update_optimizers, remove(subject, self, lambda: LazyTensors.of(weights or {}).key))

    def _renderables(self) -> list[RenderableType]:
        alike: dict[tuple[str, str], list[str]] = {}
        for name, kind in self.kinds.items():
            by_number = kind == "head" and name in self.units
            alike.setdefault((name if by_number else _pattern(name), self._change(name)), []).append(name)
        several = Counter(_pattern(shown) for shown, _ in alike)
        rows = []
        for (shown, change), names in alike.items():
            layer, where = shown, ""
            if len(names) == 1:
                layer = names[0] or "the model"
            else:
                star = shown.split(".").index("*")
                which = f": {', '.join(name.split('.')[star] for name in names)}" if several[_pattern(shown)] > 1 else ""
                where = f" in each of {len(names)}{which}"
            rows.append((layer, f"{change}{where}"))
        first, *costs = self._costs()
        notes = [Padding.indent(Text(line), 2) for line in (*costs, *self._notes())]
        return [first, *notes[: len(costs)], text_table(rows, aligns="<", indent=2), *notes[len(costs) :]]

    def _change(self, name: str) -> str:
        """Returns what becomes of a place: heads by number, other units by how many."""
        kind, before, after, removed = self.kinds[name], self.before[name], self.after[name], self.units.get(name, [])
        if kind != "head":
            return f"{before[0]:,} -> {after[0]:,} {PLURAL[kind]}" if removed else f"{before[0]:,} {PLURAL[kind]}"
        query, kv = before
        if not removed:
            return f"{query} query, {kv} KV heads" if kv != query else f"{query} heads"
        then = "{} query, {} KV".format(*after) if kv != query else f"{after[0]}"
        return f"{query} -> {then} heads; without {', '.join(map(str, removed))}"

    def _costs(self) -> list[str]:
        """Says what the model costs before and after: first its parameters."""
        costs = [("parameters", *self.parameters)]
        if self.costs:
            before, after = self.costs
            flops, cache = "FLOPs a token" if before.context else "FLOPs an image", f"KV-cache bytes a token in {before.dtype}"
            for label, name in {flops: "flops", cache: "kv_cache_bytes", "bytes": "bytes"}.items():
                if getattr(before, name) and getattr(after, name):
                    costs.append((label, getattr(before, name), getattr(after, name)))
        lines = [f"{then:,} -> {now:,} {label} ({1 - now / then:.1%} fewer)" for label, then, now in costs]
        return [f"{self.model}: {lines[0]}", *lines[1:]]

    def _notes(self) -> list[str]:
        """Says what else there is to know: row lengths that suit no engine, numbers of KV heads."""
        heads = [name for name in self.units if self.kinds[name] == "head" and self.after[name][1] < self.before[name][1]]
        numbers = sorted({self.after[name][1] for name in heads})
        return [*map(str, self.rows), *(uneven_devices_note(number) for number in numbers if not divides_among_devices(number))]


def _is_kind(value: object) -> bool:
    return value in get_args(UnitKind)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(number) is int for number in value)


def _find_again(
    made_for: str,
    kinds: Mapping[str, UnitKind],
    before: Mapping[str, tuple[int, ...]],
    units: Mapping[str, list[int]],
    model: nn.Module,
) -> Cut:
    """Finds a cut again, and refuses a model whose class, places or numbers of units are others."""
    structure = trace(model)
    layers = units_of(model, structure, dict.fromkeys(kinds.values()))
    now = {name: counts(layer) for name, layer in layers.items()}
    if made_for == type(model).__name__ and before == now:
        return find_cut(model, structure, layers, units)
    differs = "another class"
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            then, there = (" and ".join(map(str, numbers.get(name, ["none"]))) for numbers in (before, now))
            differs = f"{name or 'the model'}: {then} then, {there} now"
            break
    raise ValueError(f"plan: it was made for a {made_for} with other units than this {type(model).__name__} has ({differs})")


def _pattern(name: str) -> str:
    return name_pattern(f"{name}.").strip(". ") or "the model"


def check_kinds(model: nn.Module, kinds: Collection[UnitKind]) -> None:
    """Refuses residual channels together with heads or channels, of a model whose blocks come from files.

    These are compared with their mask in the model without the residual channels, of which there would be two on files.
    """
    if "residual" in kinds and {"head", "channel"} & set(kinds):
        store_of(model).check_can_hold_all("residual: these channels and those within blocks do not go both at once")
