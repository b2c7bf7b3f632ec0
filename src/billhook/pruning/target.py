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

from billhook.arguments import percentage_hint
from billhook.model.costs import Costs, costs_of
from billhook.pruning.amount import (
    RATIOS,
    Amount,
    RowLength,
    kernel_multiple,
    nearby_counts,
    round_kv_heads,
    rounding_multiple,
    unit_length,
)
from billhook.pruning.choice import Counts, choose_units, protected_modules, unprotected
from billhook.pruning.cut import Cut, find_cut, size_after
from billhook.pruning.removal import try_removal
from billhook.serving.engines import MULTIPLES, multiple_of
from billhook.tracing.trace import trace
from billhook.units.find import of_kind, units_of, why_none
from billhook.units.units import Units

ALONE = 0.52
"""The share of channels up to which they alone go for a target: there the loss of SmolLM2 without channels meets that of one
which has lost KV heads, too (docs/evidence/equal_size.md)."""


class RatioSearch:
    """The ratios of an amount, found for one model; it remembers what models of each shape cost."""

    def __init__(self, model: PreTrainedModel, amount: Amount) -> None:
        self.model, self.amount = model, amount
        self.first: Counts | None = None
        self.structure = trace(model)
        self.units: dict[str, Units] = units_of(model, self.structure, amount.kinds)
        self.protected = protected_modules(model, self.units, amount)
        self._steps = _steps(model, self.units)
        self._ratios: dict[str, float] | None = None
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Costs] = {}

    def part(self, amount: Amount, first: Counts) -> "RatioSearch":
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
        return self.cut(self._flat_scores())

    def removes_any(self) -> bool:
        """Tells whether the ratios of an amount without a target come to a unit anywhere, whatever the scores."""
        return bool(self._choose(self._flat_scores(), self.amount.ratios, self.amount))

    def _flat_scores(self) -> dict[str, Tensor]:
        return {name: torch.zeros(layer.count(self.amount.per)) for name, layer in self.units.items()}

    def removable(self, *ratios: str) -> dict[str, Units]:
        """Returns the places that may lose units by some ratios, or by all that matter."""
        kinds = [RATIOS[ratio][0] for ratio in ratios or self.amount.requested]
        return {name: layer for kind in kinds for name, layer in unprotected(of_kind(self.units, kind), self.protected).items()}

    def cut(self, scores: Mapping[str, Tensor]) -> Cut:
        """Finds the cut that scores lead to; refuses it if so much cannot be removed, or no unit would be."""
        if self._ratios is None or self.amount.ranking == "global":
            self._ratios = self._find_ratios(scores)
        cut = self._cut(scores, self._ratios)
        if not cut.units:
            ratios = ", ".join(f"{name}={ratio:g}" for name, ratio in self._ratios.items())
            rounded = "" if self.amount.round_to in ("auto", 1) else f" (round_to={self.amount.round_to})"
            step = max(self._steps.values(), default=1)
            kernel = "" if step == 1 else f" (the kernel of the experts takes channels in multiples of {step})"
            raise ValueError(f"{ratios}{rounded} is not a single unit of a place{kernel}, so that nothing would be removed")
        return cut

    def step(self, name: str) -> int:
        """Returns the number of which the channels that a place keeps must be a multiple."""
        by = rounding_multiple(self.units[name].count()) if self.amount.round_to == "auto" else self.amount.round_to
        return math.lcm(by, self._steps.get(name, 1))

    def costs(self, cut: Cut) -> tuple[Costs, Costs]:
        """Returns what the model costs before and after a cut; how many units are removed decides it, not which."""
        num_kept = tuple(cut.after.items())
        if num_kept not in self._known:
            self._known[num_kept] = costs_of(try_removal(self.model, cut))
        return self.now, self._known[num_kept]

    def limit(self, target: str) -> int:
        """Returns a target as a number; refuses one that the model cannot have, or has already."""
        wanted, now = getattr(self.amount, target), getattr(self.now, target)
        if now is None:
            raise ValueError(f"{target}={wanted}: it cannot be measured of a {type(self.model).__name__}")
        limit = int(wanted * now) if isinstance(wanted, float) else int(wanted)
        if limit >= now:
            raise ValueError(f"{target}={wanted}: the model has no more than that, {now:,}")
        return limit

    def row_lengths(self, scores: Mapping[str, Tensor], cut: Cut) -> tuple[RowLength, ...]:
        """Returns how long rows become by a cut that scores led to; nothing where `round_to` is not `"auto"`."""
        if self.amount.round_to != "auto" or self._ratios is None:
            return ()
        exact = self._choose(scores, self._ratios, replace(self.amount, round_to=1))
        num_asked = {name: layer.count() - len(exact.get(name, [])) for name, layer in self.units.items()}
        return row_lengths(self.model, cut, num_asked, self.amount.min_units)

    def _choose(self, scores: Mapping[str, Tensor], ratios: Mapping[str, float], amount: Amount) -> dict[str, list[int]]:
        return choose_units(self.units, scores, amount, ratios, self.protected, self._steps, self.first)

    def _cut(self, scores: Mapping[str, Tensor], ratios: Mapping[str, float], target: bool = False) -> Cut:
        """Finds the cut of some ratios; for a target, numbers that are found for it are not rounded unless they must be."""
        exact = self.amount.open_ratios if target and self.amount.round_to == "auto" else ()
        chosen: dict[str, list[int]] = {}
        for amount, of_target in ((self.amount, False), (replace(self.amount, round_to=1), True)):
            some = {name: ratio for name, ratio in ratios.items() if (name in exact) == of_target}
            chosen |= self._choose(scores, some, amount)
        return find_cut(self.model, self.structure, self.units, chosen)

    def _find_ratios(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the given ratios, and those that lead to the target."""
        ratios, target, names = self.amount.ratios, self.amount.target, self.amount.open_ratios
        if target is None:
            return ratios
        limit = self.limit(target)

        def left(ratio: float, names: Sequence[str], ratios: Mapping[str, float]) -> int:
            alike = {name: min(ratio, self._highest(name)) for name in names}
            return self.cost(self._cut(scores, {**ratios, **alike}, target=True), target)

        def lowest_ratio(names: Sequence[str], ratios: Mapping[str, float]) -> float | None:
            """Finds the lowest ratio, of kinds alike and next to other ratios, that meets the target; None if none does."""
            tries = self._tries(names)
            number = first_within(len(tries), lambda number: left(tries[number], names, ratios), limit)
            return None if number is None else tries[number]

        if len(names) > 1:
            without_heads = ratios | {"kv_heads": 0.0}
            ratio = lowest_ratio(names[-1:], without_heads)
            if ratio is not None and ratio <= ALONE:
                return without_heads | {names[-1]: ratio}
        common = lowest_ratio(names, ratios)
        if common is None:
            wanted, tries = getattr(self.amount, target), self._tries(names)
            least, most = (left(ratio, names, ratios) for ratio in (tries[-1], tries[0]))
            raise ValueError(
                f"{target}={wanted}: {limit:,} cannot be reached; with what may be removed, {least:,} to {most:,} can"
                f"{percentage_hint(wanted)}"
            )
        ratios |= {name: min(common, self._highest(name)) for name in names}
        if len(names) > 1:  # heads are few and large: channels alone then come as close as they can
            for near in (ratios | self._suiting(ratios["kv_heads"]), ratios):
                ratio = lowest_ratio(names[-1:], near)
                if ratio is not None:
                    return near | {names[-1]: ratio}
        return ratios

    def _suiting(self, ratio: float) -> dict[str, float]:
        """Returns the nearest ratio of KV heads that leaves a number that engines can divide; none if that is not ours."""
        counts = set(self._counts("kv_heads"))
        if self.amount.round_to != "auto" or self.amount.ranking == "global" or len(counts) != 1:
            return {}
        count = counts.pop()
        return {"kv_heads": 1 - round_kv_heads(count - int(ratio * count + 1e-9), count, self.amount.min_units) / count}

    @cached_property
    def now(self) -> Costs:
        """The costs of the model as it is."""
        return costs_of(self.model)

    def _counts(self, name: str) -> list[int]:
        return [layer.count(RATIOS[name][1]) for layer in self.removable(name).values()]

    def _tries(self, names: Sequence[str]) -> list[float]:
        """Returns the ratios at which one more unit is removed."""
        tries = {0.0}
        for name in names:
            counts = self._counts(name)
            for count in set(counts if self.amount.ranking == "layer" else [sum(counts)]):
                tries.update(number / count for number in range(count))
        return sorted(tries)

    def _highest(self, name: str) -> float:
        """Returns the highest ratio of a kind that leaves `min_units` everywhere; 0 where none may be removed."""
        return min((max(count - self.amount.min_units, 0) / count for count in self._counts(name)), default=0.0)

    def cost(self, cut: Cut, target: str) -> int:
        """Returns what is left after a cut of what a target limits."""
        if target == "params":
            return cut.parameters[1]
        if target == "bytes":
            named = self.model.named_parameters()
            return sum(math.prod(size_after(cut.cuts, name, p.shape)) * p.element_size() for name, p in named)
        value: int = getattr(self.costs(cut)[1], target)
        return value


def _steps(model: PreTrainedModel, units: Mapping[str, Units]) -> dict[str, int]:
    """Returns the numbers of which units must be a multiple: the same for as many units, which a config counts in one field."""
    most: dict[tuple[str, int], int] = {}
    for layer in units.values():
        key = (layer.kind, layer.count())
        most[key] = max(most.get(key, 1), kernel_multiple(model, layer))
    return {name: most[layer.kind, layer.count()] for name, layer in units.items()}


@dataclass(frozen=True)
class Baseline:
    """A model before any part of an amount was removed; parts are of what there was then, so that they do not compound.

    Attributes:
        counts: By the name of a ratio, and by place, how many units there were that may be removed.
        figure: What there was of what the target limits.
    """

    counts: dict[str, dict[str, int]]
    figure: int | None

    @classmethod
    def of(cls, search: RatioSearch) -> "Baseline":
        """Notes a model as a search has found it."""
        counts = {
            name: {layer: of_layer.count(per) for layer, of_layer in search.removable(name).items()}
            for name, (_, per) in search.amount.requested.items()
        }
        return cls(counts, getattr(search.now, search.amount.target) if search.amount.target else None)

    def part(self, search: RatioSearch, progress: float) -> RatioSearch | None:
        """Returns a search for what of its amount is to be gone at a progress in 0..1; None if it is gone.

        Its ratios are of what there was at first, by which each part is also rounded, so that parts add up to what the whole
        would be at once.
        """
        amount = search.amount
        changes: dict[str, Any] = {name: progress * ratio for name, ratio in amount.ratios.items()}
        if amount.target is not None and self.figure is not None:
            wanted = getattr(amount, amount.target)
            goal = int(wanted * self.figure) if isinstance(wanted, float) else int(wanted)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= (getattr(search.now, amount.target) or 0):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        part = search.part(replace(amount, **changes), self.counts)
        return part if amount.target is not None or part.removes_any() else None


def first_within(count: int, cost: Callable[[int], int], limit: int) -> int | None:
    """Finds the first of some numbers from 0 at which a falling cost is within a limit; None if it never is.

    It looks where that would be if the cost fell evenly, and every other time in the middle.

    >>> first_within(100, lambda number: 1000 - 7 * number, 500)
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


def row_lengths(model: nn.Module, cut: Cut, num_asked: Mapping[str, int], least: int = 1) -> tuple[RowLength, ...]:
    """Returns how long the rows become that a cut makes shorter, those that were 256 or longer.

    Args:
        model: The model.
        cut: What is removed.
        num_asked: By place, how many units would stay by what was asked for.
        least: The fewest that may stay.
    """
    alike: dict[RowLength, list[str]] = {}
    for name in cut.units:
        layer, num_kept, length = cut.all_units[name], cut.after[name][0], unit_length(cut.all_units[name])
        if layer.count() * length >= MULTIPLES[0]:
            row = RowLength(layer.kind, 1, length, num_asked[name], num_kept, multiple_of(num_kept * length))
            alike.setdefault(row, []).append(name)
    rows = list[RowLength]()
    for row, names in alike.items():
        counts = {name: cut.all_units[name].count() for name in names}
        options = {} if row.kind == "head" else nearby_counts(row.asked, row.kept, max(counts.values()), least)
        instead = list[tuple[int, int, int]]()
        for num_kept, multiple in options.items():
            chosen = cut.units | {name: list(range(num_kept, count)) for name, count in counts.items()}
            then = find_cut(model, cut.structure, cut.all_units, chosen)
            instead.append((num_kept, multiple, then.parameters[1] - cut.parameters[1]))
        rows.append(replace(row, places=len(names), others=tuple(instead)))
    return tuple(rows)
