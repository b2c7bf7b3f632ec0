"""Finds the ratios that lead to a target, all at once or in parts, and what a model then costs."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.arguments import as_percentage
from billhook.model.figures import Figures, figures_of
from billhook.pruning.amount import RATIOS, Amount, RowLength, finest, length_of, others, suiting, width_step
from billhook.pruning.choice import Counts, choose_units, free, most, protected_places
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.removal import tried
from billhook.serving.engines import MULTIPLES, multiple_of
from billhook.tracing.trace import trace
from billhook.units.find import of_kind, units_of, why_none
from billhook.units.units import Units

ALONE = 0.52
"""The share of channels up to which they alone go for a target: there the loss of SmolLM2 without channels meets that of one
which has lost KV heads, too (docs/smaller.md)."""


class Search:
    """The ratios of an amount, found for one model; it remembers what models of each shape cost."""

    def __init__(self, model: PreTrainedModel, amount: Amount, first: Counts | None = None) -> None:
        self.model, self.amount, self.first = model, amount, first
        self.structure = trace(model)
        self.units: dict[str, Units] = units_of(model, self.structure, amount.kinds)
        self.protected = protected_places(model, self.units, amount)
        self._steps = _steps(model, self.units)
        self._ratios: dict[str, float] | None = None
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Figures] = {}

    def part(self, amount: Amount, first: Counts) -> "Search":
        """Returns a search for a part of the amount, in what has been found of the model; its ratios are of what was `first`."""
        part = copy.copy(self)
        part.amount, part.first, part._ratios = amount, first, None
        return part

    def check(self) -> Cut:
        """Refuses the amount if so much cannot be removed, whatever the scores, by saying what can; returns a cut of so much."""
        for name, ratio in self.amount.ratios.items():
            kind = RATIOS[name][0]
            if ratio and not of_kind(self.units, kind):
                why = why_none(self.model, self.structure, kind)
                raise ValueError(f"{name}={ratio:g}: the model has none that may be removed{why}")
        return self.cut({name: torch.zeros(one.count(self.amount.per)) for name, one in self.units.items()})

    def removes_any(self) -> bool:
        """Tells whether the ratios of an amount without a target come to a unit anywhere, whatever the scores."""
        flat = {name: torch.zeros(one.count(self.amount.per)) for name, one in self.units.items()}
        return bool(choose_units(self.units, flat, self.amount, self.amount.ratios, self.protected, first=self.first))

    def free(self) -> dict[str, Units]:
        """Returns the places that may lose units."""
        return {name: one for kind in self.amount.kinds for name, one in free(of_kind(self.units, kind), self.protected).items()}

    def cut(self, scores: Mapping[str, Tensor]) -> Cut:
        """Finds the cut that scores lead to; refuses it if so much cannot be removed, or no unit would be."""
        if self._ratios is None or self.amount.ranking == "global":
            self._ratios = self._found_ratios(scores)
        found = self._cut(scores, self._ratios)
        if not found.units:
            ratios = ", ".join(f"{name}={ratio:g}" for name, ratio in self._ratios.items())
            rounded = "" if self.amount.round_to in ("auto", 1) else f" (round_to={self.amount.round_to})"
            step = max(self._steps.values(), default=1)
            kernel = "" if step == 1 else f" (the kernel of the experts takes channels in multiples of {step})"
            raise ValueError(f"{ratios}{rounded} is not a single unit of a place{kernel}, so that nothing would be removed")
        return found

    def step(self, place: str) -> int:
        """Returns the number of which the channels that a place keeps must be a multiple."""
        by = finest(self.units[place].count()) if self.amount.round_to == "auto" else self.amount.round_to
        return math.lcm(by, self._steps.get(place, 1))

    def costs(self, cut: Cut) -> tuple[Figures, Figures]:
        """Returns what the model costs before and after a cut; how many units are removed decides it, not which."""
        remains = tuple(cut.after.items())
        if remains not in self._known:
            self._known[remains] = figures_of(tried(self.model, cut))
        return self.now, self._known[remains]

    def limit(self, target: str) -> int:
        """Returns a target as a number; refuses one that the model cannot have, or has already."""
        asked, now = getattr(self.amount, target), getattr(self.now, target)
        if now is None:
            raise ValueError(f"{target}={asked}: it cannot be measured of a {type(self.model).__name__}")
        limit = int(asked * now) if isinstance(asked, float) else int(asked)
        if limit >= now:
            raise ValueError(f"{target}={asked}: the model has no more than that, {now:,}")
        return limit

    def row_lengths(self, scores: Mapping[str, Tensor], cut: Cut) -> tuple[RowLength, ...]:
        """Returns how long rows become by a cut that scores led to; nothing where `round_to` is not `"auto"`."""
        if self.amount.round_to != "auto" or self._ratios is None:
            return ()
        exact = self._chosen(scores, self._ratios, replace(self.amount, round_to=1))
        asked = {name: one.count() - len(exact.get(name, [])) for name, one in self.units.items()}
        return row_lengths(self.model, cut, asked, self.amount.min_units)

    def _chosen(self, scores: Mapping[str, Tensor], ratios: Mapping[str, float], amount: Amount) -> dict[str, list[int]]:
        return choose_units(self.units, scores, amount, ratios, self.protected, self._steps, self.first)

    def _cut(self, scores: Mapping[str, Tensor], ratios: Mapping[str, float], target: bool = False) -> Cut:
        """Finds the cut of some ratios; for a target, numbers that are found for it are not rounded unless they must be."""
        exact = self.amount.open if target and self.amount.round_to == "auto" else ()
        given = {name: ratio for name, ratio in ratios.items() if name not in exact}
        found = {name: ratio for name, ratio in ratios.items() if name in exact}
        chosen = self._chosen(scores, given, self.amount) | self._chosen(scores, found, replace(self.amount, round_to=1))
        return find_cut(self.model, self.structure, self.units, chosen)

    def _found_ratios(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the given ratios, and those that lead to the target."""
        ratios, target, names = self.amount.ratios, self.amount.target, self.amount.open
        if target is None:
            return ratios
        limit = self.limit(target)
        if len(names) > 1:
            alone = self._first(scores, names[-1:], ratios | {"kv_heads": 0.0}, target, limit)
            if alone is not None and alone <= ALONE:
                return ratios | {"kv_heads": 0.0, names[-1]: alone}
        common = self._lowest(scores, names, ratios, target, limit)
        ratios |= {name: min(common, self._most(name)) for name in names}
        if len(names) == 1:
            return ratios
        # heads are few and large: channels alone then come as close as they can
        near = ratios | self._suiting(ratios["kv_heads"])
        found = self._first(scores, names[-1:], near, target, limit)
        if found is not None:
            return near | {names[-1]: found}
        return ratios | {names[-1]: self._lowest(scores, names[-1:], ratios, target, limit)}

    def _suiting(self, ratio: float) -> dict[str, float]:
        """Returns the nearest ratio of KV heads that leaves a number that engines can divide; none if that is not ours."""
        own = free(of_kind(self.units, "head"), self.protected)
        counts = {one.count("kv_head") for one in own.values()}
        if self.amount.round_to != "auto" or self.amount.ranking == "global" or len(counts) != 1:
            return {}
        count = counts.pop()
        return {"kv_heads": 1 - suiting(count - int(ratio * count + 1e-9), count, self.amount.min_units) / count}

    def _lowest(
        self, scores: Mapping[str, Tensor], names: Sequence[str], ratios: dict[str, float], target: str, limit: int
    ) -> float:
        """Finds the lowest ratio, of kinds alike and next to other ratios, that meets a target; refuses one that none does."""
        found = self._first(scores, names, ratios, target, limit)
        if found is None:
            asked, tries = getattr(self.amount, target), self._tries(names)
            least, most = (self._left(scores, names, ratios, target, ratio) for ratio in (tries[-1], tries[0]))
            raise ValueError(
                f"{target}={asked}: {limit:,} cannot be reached; with what may be removed, {least:,} to {most:,} can"
                f"{as_percentage(asked)}"
            )
        return found

    def _first(
        self, scores: Mapping[str, Tensor], names: Sequence[str], ratios: dict[str, float], target: str, limit: int
    ) -> float | None:
        """Finds the lowest ratio, of kinds alike and next to other ratios, that meets a target; None if none does."""
        tries = self._tries(names)
        place = lowest(len(tries), lambda number: self._left(scores, names, ratios, target, tries[number]), limit)
        return None if place is None else tries[place]

    def _left(
        self, scores: Mapping[str, Tensor], names: Sequence[str], ratios: dict[str, float], target: str, ratio: float
    ) -> int:
        """Returns what is left of what a target limits at a ratio of some kinds."""
        own = {name: min(ratio, self._most(name)) for name in names}
        return self.cost(self._cut(scores, ratios | own, target=True), target)

    @cached_property
    def now(self) -> Figures:
        """The costs of the model as it is."""
        return figures_of(self.model)

    def _tries(self, names: Sequence[str]) -> list[float]:
        """Returns the ratios at which one more unit is removed."""
        tries = {0.0}
        for name in names:
            kind, per = RATIOS[name]
            counts = [one.count(per) for one in free(of_kind(self.units, kind), self.protected).values()]
            steps = dict.fromkeys(counts if self.amount.ranking == "layer" else [sum(counts)])
            tries |= {number / count for count in steps for number in range(count)}
        return sorted(tries)

    def _most(self, name: str) -> float:
        return most(self.units, name, self.amount, self.protected)

    def cost(self, cut: Cut, target: str) -> int:
        """Returns what is left after a cut of what a target limits."""
        if target == "params":
            return cut.parameters[1]
        if target == "bytes":
            sizes = {name: (p.element_size(), p.shape) for name, p in self.model.named_parameters()}
            return sum(
                size * math.prod(len(cut.cuts.get((name, d), range(n))) for d, n in enumerate(shape))
                for name, (size, shape) in sizes.items()
            )
        value: int = getattr(self.costs(cut)[1], target)
        return value


def _steps(model: PreTrainedModel, units: Mapping[str, Units]) -> dict[str, int]:
    """Returns the numbers of which units must be a multiple: the same for as many units, which a config counts in one field."""
    most: dict[tuple[str, int], int] = {}
    for one in units.values():
        key = (one.kind, one.count())
        most[key] = max(most.get(key, 1), width_step(model, one))
    return {name: most[one.kind, one.count()] for name, one in units.items()}


@dataclass(frozen=True)
class First:
    """A model before any part of an amount was removed; parts are of what there was then, so that they do not compound.

    Attributes:
        counts: By the name of a ratio, and by place, how many units there were that may be removed.
        figure: What there was of what the target limits.
    """

    counts: dict[str, dict[str, int]]
    figure: int | None

    @classmethod
    def of(cls, search: Search) -> "First":
        """Notes a model as a search has found it."""
        counts: dict[str, dict[str, int]] = {}
        for name, (kind, per) in search.amount.asked.items():
            able = free(of_kind(search.units, kind), search.protected)
            counts[name] = {place: one.count(per) for place, one in able.items()}
        return cls(counts, getattr(search.now, search.amount.target) if search.amount.target else None)

    def part(self, search: Search, progress: float) -> Search | None:
        """Returns a search for what of its amount is to be gone at a progress in 0..1; None if it is gone.

        Its ratios are of what there was at first, by which each part is also rounded, so that parts add up to what the whole
        would be at once.
        """
        amount = search.amount
        changes: dict[str, Any] = {name: progress * ratio for name, ratio in amount.ratios.items()}
        if amount.target is not None and self.figure is not None:
            asked = getattr(amount, amount.target)
            goal = int(asked * self.figure) if isinstance(asked, float) else int(asked)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= (getattr(search.now, amount.target) or 0):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        part = search.part(replace(amount, **changes), self.counts)
        return part if amount.target is not None or part.removes_any() else None


def lowest(count: int, cost: Callable[[int], int], limit: int) -> int | None:
    """Finds the first of some numbers from 0 at which a falling cost is within a limit; None if it never is.

    It looks where that would be if the cost fell evenly, and every other time in the middle.

    >>> lowest(100, lambda number: 1000 - 7 * number, 500)
    72
    """
    low, high = -1, count - 1
    above, below = cost(0), cost(high)
    if below > limit:
        return None
    halve = False
    while high - low > 1:
        even = low + (above - limit) / max(above - below, 1) * (high - low)
        middle = (low + high) // 2 if halve else min(max(math.ceil(even), low + 1), high - 1)
        if (now := cost(middle)) <= limit:
            high, below = middle, now
        else:
            low, above = middle, now
        halve = not halve and high - low > 8
    return high


def row_lengths(model: nn.Module, cut: Cut, asked: Mapping[str, int], least: int = 1) -> tuple[RowLength, ...]:
    """Returns how long the rows become that a cut makes shorter, those that were 256 or longer.

    Args:
        model: The model.
        cut: What is removed.
        asked: By place, how many units would stay by what was asked for.
        least: The fewest that may stay.
    """
    units = cut.places
    alike: dict[RowLength, list[str]] = {}
    for name in cut.units:
        one, kept, each = units[name], cut.after[name][0], length_of(units[name])
        if one.count() * each >= MULTIPLES[0]:
            row = RowLength(one.kind, 1, each, asked[name], kept, multiple_of(kept * each))
            alike.setdefault(row, []).append(name)
    found = list[RowLength]()
    for row, places in alike.items():
        counts = {name: units[name].count() for name in places}
        options = {} if row.kind == "head" else others(row.asked, row.kept, max(counts.values()), least)
        more = list[tuple[int, int, int]]()
        for kept, multiple in options.items():
            chosen = cut.units | {name: list(range(kept, count)) for name, count in counts.items()}
            then = find_cut(model, cut.structure, units, chosen)
            more.append((kept, multiple, then.parameters[1] - cut.parameters[1]))
        found.append(replace(row, places=len(places), others=tuple(more)))
    return tuple(found)
