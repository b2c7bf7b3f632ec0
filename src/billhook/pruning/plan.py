"""Which units are removed from a model, as a plan."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text
from torch import nn
from typing_extensions import Self

from billhook.display import columns
from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.model.figures import Figures
from billhook.model.find import find_transformer
from billhook.model.plan import ShapePlan, Weights, starting_from
from billhook.model.surgery import Follow, follow
from billhook.pruning.amount import RowLength, rows_from, suits, unsuited
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.removal import remove
from billhook.tracing.show import pattern
from billhook.tracing.trace import trace
from billhook.units.find import units_of
from billhook.units.units import PLURAL, UnitKind, counted, counts


@dataclass(frozen=True, eq=False, repr=False)
class UnitPlan(Cut, ShapePlan):
    """Which heads, channels, residual channels or experts are removed, and what the model costs then; `print` shows a table."""

    kind: ClassVar[str] = "units"
    costs: tuple[Figures, Figures] | None = None
    rows: tuple[RowLength, ...] = ()

    @classmethod
    def of(cls, cut: Cut, costs: tuple[Figures, Figures] | None = None, rows: tuple[RowLength, ...] = ()) -> Self:
        """Makes a plan of what has been found."""
        return cls(**vars(cut), costs=costs, rows=rows)

    @property
    def words(self) -> str:
        """How many units of each kind are removed, in words."""
        gone = {kind: [len(own) for name, own in self.units.items() if self.kinds[name] == kind] for kind in self.kinds.values()}
        return ", ".join(f"{counted(kind, sum(own))}{_inside(kind, len(own))}" for kind, own in gone.items() if own)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; see `ModelPlan.to_json`."""
        return {
            "kind": self.kind,
            "model": self.model,
            "kinds": dict(self.kinds),
            "units": {name: list(own) for name, own in self.units.items()},
            "before": {name: list(counts) for name, counts in self.before.items()},
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        parts = ("model", "kinds", "units", "before")
        if not all(part in plain for part in parts):
            raise ValueError(f"plan: a mapping with {', '.join(parts)} is needed, as to_json returns it")
        for part in parts[1:]:
            given, kinds = plain[part], get_args(UnitKind)
            holds = isinstance(given, Mapping) and all(
                own in kinds if part == "kinds" else _is_list(own) for own in given.values()
            )
            if not holds:
                raise ValueError(f"plan: {part} is {str(given)[:80]!r}, and must be as to_json returns it")
        before = {name: tuple(own) for name, own in plain["before"].items()}
        rows = rows_from(plain.get("rows", []))
        return cls.of(_again(plain["model"], plain["kinds"], before, plain["units"], find_transformer(model)), rows=rows)

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that the plan was not made for; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        now = _again(self.model, self.kinds, self.before, self.units, subject).cuts
        if now.keys() != self.cuts.keys() or any(not np.array_equal(stays, now[place]) for place, stays in self.cuts.items()):
            raise ValueError(
                f"plan: it was made for a {self.model} with other units than this {type(subject).__name__} has (its tensors hold "
                "others)"
            )

    def change(self, model: nn.Module, weights: Weights | None = None) -> Follow:
        """Removes the units; see `ShapePlan.change`."""
        subject = find_transformer(model)
        check_kinds(subject, self.kinds.values())
        with starting_from(subject, weights):
            return partial(follow, remove(subject, self, lambda: LazyTensors.of(weights or {}).key))

    def _shown(self) -> list[RenderableType]:
        first, *costs = self._costs()
        rows: dict[tuple[str, str], list[str]] = {}
        for name, kind in self.kinds.items():
            gone = self.units.get(name, [])
            change = _change(kind, self.before[name], self.after[name], gone)
            alike = name if kind == "head" and gone else _pattern(name)
            rows.setdefault((alike, change), []).append(name)
        several = Counter(_pattern(alike) for alike, _ in rows)
        shown = []
        for (alike, change), names in rows.items():
            place, where = _places(alike, names, several[_pattern(alike)] > 1)
            shown.append((place, f"{change}{where}"))
        notes = [Padding(Text(line), (0, 0, 0, 2)) for line in (*costs, *self._notes())]
        return [first, *notes[: len(costs)], columns(shown, aligns="<", indent=2), *notes[len(costs) :]]

    def _costs(self) -> list[str]:
        """Says what the model costs before and after: first its parameters."""
        before, after = self.parameters
        lines = [f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"]
        flops = "FLOPs a token" if not self.costs or self.costs[0].context else "FLOPs an image"
        cache = f"KV-cache bytes a token in {self.costs[0].dtype}" if self.costs else ""
        for label, field in {flops: "flops", cache: "kv_cache_bytes", "bytes": "bytes"}.items():
            now, then = [getattr(cost, field) for cost in self.costs] if self.costs else (None, None)
            if now and then:
                lines.append(f"{now:,} -> {then:,} {label} ({1 - then / now:.1%} fewer)")
        return lines

    def _notes(self) -> list[str]:
        """Says what else there is to know: row lengths that suit no engine, numbers of KV heads."""
        heads = [name for name in self.units if self.kinds[name] == "head" and self.after[name][1] < self.before[name][1]]
        numbers = sorted({self.after[name][1] for name in heads})
        return [*map(str, self.rows), *(unsuited(number) for number in numbers if not suits(number))]


def _inside(kind: UnitKind, places: int) -> str:
    """Says in how many modules units are; there is one stream of residual channels."""
    module = "attention module" if kind == "head" else "module"
    return "" if kind == "residual" and places == 1 else f" in {places:,} {module}{'s' * (places != 1)}"


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(number) is int for number in value)


def _again(
    made_for: str,
    kinds: Mapping[str, UnitKind],
    before: Mapping[str, tuple[int, ...]],
    units: Mapping[str, list[int]],
    model: nn.Module,
) -> Cut:
    """Finds a cut again, and refuses a model whose class, places or numbers of units are others."""
    structure = trace(model)
    found = units_of(model, structure, dict.fromkeys(kinds.values()))
    now = {name: counts(one) for name, one in found.items()}
    if made_for == type(model).__name__ and before == now:
        return find_cut(model, structure, found, units)
    name = next((name for name in [*before, *now] if before.get(name) != now.get(name)), None)
    differs = f"{name}: {_numbers(before.get(name or ''))} then, {_numbers(now.get(name or ''))} now" if name else "another class"
    raise ValueError(f"plan: it was made for a {made_for} with other units than this {type(model).__name__} has ({differs})")


def _numbers(numbers: tuple[int, ...] | None) -> str:
    return "none" if numbers is None else " and ".join(map(str, numbers))


def _pattern(name: str) -> str:
    return pattern(f"{name}.").strip(". ") or "the model"


def _places(alike: str, names: Sequence[str], differ: bool) -> tuple[str, str]:
    """Returns what stands before and after the change of some places: their number, and which where others differ."""
    if len(names) == 1:
        return names[0] or "the model", ""
    which = [next(own for own, star in zip(name.split("."), alike.split("."), strict=True) if star == "*") for name in names]
    return alike, f" in each of {len(names)}" + (f": {', '.join(which)}" if differ else "")


def _change(kind: UnitKind, before: tuple[int, ...], after: tuple[int, ...], gone: Sequence[int]) -> str:
    """Returns a line of the table: heads by number, other units by how many."""
    if kind != "head":
        return f"{before[0]:,} -> {after[0]:,} {PLURAL[kind]}" if gone else f"{before[0]:,} {PLURAL[kind]}"
    query, kv = before
    if not gone:
        return f"{query} query, {kv} KV heads" if kv != query else f"{query} heads"
    then = "{} query, {} KV".format(*after) if kv != query else f"{after[0]}"
    return f"{query} -> {then} heads; without {', '.join(map(str, gone))}"


def check_kinds(model: nn.Module, kinds: Collection[UnitKind]) -> None:
    """Refuses residual channels together with heads or channels, of a model whose blocks come from files.

    These are compared with their mask in the model without the residual channels, of which there would be two on files.
    """
    if "residual" in kinds and {"head", "channel"} & set(kinds):
        store_of(model).check_can_hold_all("residual: these channels and those within blocks do not go both at once")
