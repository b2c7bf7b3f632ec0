"""Finds the ratios that meet a budget, at once or in rounds, and the resulting costs."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.arguments import percentage_hint
from billhook.linalg import IndicesByModule, TensorsByName
from billhook.model import Costs, costs_of, named_token_ids
from billhook.pruning.amount import (
    MULTIPLES,
    PERCENT,
    RATIOS,
    Amount,
    kernel_multiple,
    multiple_of,
    round_kv_heads,
    round_units,
    unit_length,
)
from billhook.pruning.choice import choose, protected_modules
from billhook.pruning.cut import Cut, coupled_modules, find_cut, of_ranks, size_after
from billhook.pruning.removal import try_removal
from billhook.tracing.trace import trace
from billhook.units import PLURAL, UnitKind, UnitNumbers, Units, UnitsByModule, of_kind, units_of, why_none

MAX_CHANNEL_RATIO = 0.52
"""Largest channel ratio at which a budget is met by channels only: beyond it, SmolLM2 loses less if KV heads are removed, too
(docs/evidence/equal_size.md)."""

Counts = Mapping[str, Mapping[str, int]]
"""Ratio name -> module -> number of units."""


class RatioSearch:
    """The ratios of an amount for a model, with cached costs of each model shape."""

    def __init__(self, model: PreTrainedModel, amount: Amount) -> None:
        self.model, self.amount = model, amount
        self.first: Counts = {}
        self.structure = trace(model)
        self.units = units_of(model, self.structure, amount.kinds)
        self.protected = protected_modules(model, self.units, amount)
        # units must keep multiples of a step, shared by modules with the same count, because one config field holds it
        most: dict[tuple[str, int], int] = {}
        for layer in self.units.values():
            key = layer.kind, layer.count()
            most[key] = max(most.get(key, 1), kernel_multiple(model, layer))
        self._steps = {name: most[layer.kind, layer.count()] for name, layer in self.units.items()}
        self._ratios: dict[str, float] | None = None
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Costs] = {}

    def part(self, amount: Amount, first: Counts) -> "RatioSearch":
        """Returns a search for part of the amount; its ratios refer to the counts `first`."""
        part = copy.copy(self)
        part.amount, part.first, part._ratios = amount, first, None
        return part

    def check(self) -> Cut:
        """Raises if the amount is out of reach for any scores; returns a cut of this size."""
        for name, ratio in self.amount.ratios.items():
            unit_kind = RATIOS[name][0]
            if ratio and not of_kind(self.units, unit_kind):
                why = why_none(self.model, self.structure, unit_kind)
                raise ValueError(f"{name}={ratio:g}: the model has no prunable units{why}")
        return self.cut(self.equal_scores())

    def equal_scores(self) -> dict[str, Tensor]:
        """Returns scores that prefer no unit; tokens that the config names stay."""
        scores = {name: torch.zeros(layer.count(self.amount.per)) for name, layer in self.units.items()}
        for name in of_kind(self.units, "token"):
            scores[name][list(named_token_ids(self.model, len(scores[name])))] = torch.inf
        return scores

    def removable(self, *ratios: str) -> dict[str, Units]:
        """Returns the modules that may lose units by these ratios, or by all that are set."""
        free = dict[str, Units]()
        for ratio in ratios or self.amount.requested:
            layers = of_kind(self.units, RATIOS[ratio][0])
            # also without those coupled to protected modules, for example by a shared position bias
            bound = {layer for coupled in coupled_modules(layers) if not self.protected.isdisjoint(coupled) for layer in coupled}
            free |= {name: layer for name, layer in layers.items() if name not in bound}
        return free

    def cut(self, scores: TensorsByName, orders: IndicesByModule | None = None) -> Cut:
        """Finds the cut for some scores, and raises if it is out of reach or empty.

        `orders` are the channels of each expert by rank, `[experts, channels]`, of modules whose scores are those of ranks.
        """
        if self._ratios is None or self.amount.ranking == "global":
            self._ratios = self._find_ratios(scores)
        cut = self._cut(scores, self._ratios, orders=orders)
        if not cut.units:
            ratios = ", ".join(f"{name}={ratio:g}" for name, ratio in self._ratios.items())
            rounded = "" if self.amount.round_to in ("auto", 1) else f" (round_to={self.amount.round_to})"
            step = max(self._steps.values(), default=1)
            kernel = "" if step == 1 else f" (the kernel of the experts requires multiples of {step})"
            raise ValueError(f"{ratios}{rounded} removes no unit from any module{kernel}. Raise the ratio.")
        return cut

    def step(self, name: str) -> int:
        """Returns the multiple that the remaining channels of a module must have."""
        count = self.units[name].count()
        auto = next((multiple for multiple in MULTIPLES if 100 * multiple <= PERCENT * count), 1)  # any number can round to it
        by = auto if self.amount.round_to == "auto" else self.amount.round_to
        return math.lcm(by, self._steps.get(name, 1))

    def costs(self, cut: Cut) -> tuple[Costs, Costs]:
        """Returns the model's costs before and after a cut, which depend only on unit counts."""
        num_kept = tuple(cut.after.items())
        if num_kept not in self._known:
            self._known[num_kept] = costs_of(try_removal(self.model, cut))
        return self.now, self._known[num_kept]

    def limit(self, target: str) -> int:
        """Returns a budget as a number, and raises if it cannot be measured or is met already."""
        requested, current = getattr(self.amount, target), getattr(self.now, target)
        if current is None:
            raise ValueError(f"{target}={requested} cannot be measured for {type(self.model).__name__}. Use another budget.")
        limit = int(requested * current) if isinstance(requested, float) else int(requested)
        if limit >= current:
            raise ValueError(f"{target}={requested} is met already: the model has {current:,}. Use a smaller value.")
        return limit

    def width_notes(self, scores: TensorsByName, cut: Cut) -> tuple[str, ...]:
        """Returns notes on the widths after a cut, if `round_to` is `"auto"`."""
        if self.amount.round_to != "auto" or self._ratios is None:
            return ()
        exact = self.choose(scores, self._ratios, replace(self.amount, round_to=1))
        requested = {name: layer.count() - len(exact.get(name, [])) for name, layer in self.units.items()}
        return tuple(note for _, note in width_notes(cut, requested))

    def choose(self, scores: TensorsByName, ratios: Mapping[str, float], amount: Amount) -> UnitNumbers:
        """Chooses units of several kinds by their scores, and rounds remaining numbers.

        Returns ascending unit numbers by module; for attention, query heads. Heads are scored as query heads or KV heads, as the
        name of the ratio says. Raises if a score is missing or NaN, or a module would keep fewer than `min_units`.
        """
        removed = {}
        for name, ratio in ratios.items():
            if not ratio:
                continue
            per, layers = RATIOS[name][1], self.removable(name)
            if not layers:
                raise ValueError(f"{name}={ratio:g}: all are in protected blocks. Lower first or last.")
            take = partial(choose, scores=scores, min_units=amount.min_units, per=per, name=name)
            num_first = {layer: of_layer.count(per) for layer, of_layer in layers.items()} | dict(self.first.get(name, {}))
            parts: dict[float, list[str]] = {}  # modules by the fraction of their remaining units to remove
            for names in [list(layers)] if amount.ranking == "global" else [[layer] for layer in layers]:
                total, now = sum(num_first[layer] for layer in names), sum(layers[layer].count(per) for layer in names)
                unchanged = total == now or name not in amount.ratios
                part = ratio if unchanged else max(0.0, ratio * total - (total - now)) / now
                parts.setdefault(part, []).extend(names)
            chosen: UnitNumbers = {}
            for part, names in parts.items():
                chosen |= take(_subset(layers, names), ratio=part, ranking=amount.ranking)
            for coupled in coupled_modules(_subset(layers, chosen)):
                layer, count = coupled[0], layers[coupled[0]].count(per)
                num_kept = count - len(chosen[layer])
                num_rounded = _rounded(layers[layer], num_kept, num_first[layer], self._steps.get(layer, 1), amount, name)
                if num_rounded != num_kept:
                    again = take(_subset(layers, coupled), ratio=(count - num_rounded) / count)
                    chosen |= dict.fromkeys(coupled, []) | again
            for layer, numbers in chosen.items():
                if numbers:
                    removed[layer] = layers[layer].query_heads(numbers) if per == "kv_head" else numbers
        return removed

    def _cut(
        self,
        scores: TensorsByName,
        ratios: Mapping[str, float],
        target: bool = False,
        orders: IndicesByModule | None = None,
    ) -> Cut:
        """Finds the cut of some ratios; for a budget, searched counts are not rounded."""
        exact = self.amount.open_ratios if target and self.amount.round_to == "auto" else ()
        chosen: UnitNumbers = {}
        for amount, of_target in ((self.amount, False), (replace(self.amount, round_to=1), True)):
            ratios_of_pass = {name: ratio for name, ratio in ratios.items() if (name in exact) == of_target}
            chosen |= self.choose(scores, ratios_of_pass, amount)
        return find_cut(self.model, self.structure, self.units, chosen, by_expert=of_ranks(orders or {}, chosen))

    def _find_ratios(self, scores: TensorsByName) -> dict[str, float]:
        """Returns the ratios that are set, and the ratios that meet the budget."""
        ratios, target, names = self.amount.ratios, self.amount.target, self.amount.open_ratios
        if target is None:
            return ratios
        limit = self.limit(target)

        def left(ratio: float, names: Sequence[str], ratios: Mapping[str, float]) -> int:
            equal_ratios = {name: min(ratio, self._highest(name)) for name in names}
            return self.cost(self._cut(scores, {**ratios, **equal_ratios}, target=True), target)

        def lowest_ratio(names: Sequence[str], ratios: Mapping[str, float]) -> float | None:
            """Finds the lowest common ratio of some kinds that meets the budget, or None."""
            tries = self._tries(names)
            number = first_within(len(tries), lambda number: left(tries[number], names, ratios), limit)
            return None if number is None else tries[number]

        if len(names) > 1:
            without_heads = ratios | {"kv_heads": 0.0}
            ratio = lowest_ratio(names[-1:], without_heads)
            # the channels of experts are most of a mixture
            if ratio is not None and (ratio <= MAX_CHANNEL_RATIO or any(layer.of_experts for layer in self.units.values())):
                return without_heads | {names[-1]: ratio}
        common = lowest_ratio(names, ratios)
        if common is None:
            requested, tries = getattr(self.amount, target), self._tries(names)
            least, most = (left(ratio, names, ratios) for ratio in (tries[-1], tries[0]))
            narrows = target != "kv_cache_bytes" and units_of(self.model, self.structure, ["residual"])
            raise ValueError(
                f"{target}={requested} ({limit:,}) is out of reach. Reachable: {least:,} to {most:,}. Raise the budget"
                f"{' or residual=' if narrows else ''}, or use bh.shrink, which also removes blocks{percentage_hint(requested)}"
            )
        ratios |= {name: min(common, self._highest(name)) for name in names}
        if len(names) > 1:  # heads are few and large, so channels then fine-tune the size
            counts, divisible = set(self._counts("kv_heads")), ratios
            if self.amount.round_to == "auto" and self.amount.ranking != "global" and len(counts) == 1:
                count = counts.pop()
                num_kept = round_kv_heads(count - int(ratios["kv_heads"] * count + 1e-9), count, self.amount.min_units)
                divisible = ratios | {"kv_heads": 1 - num_kept / count}  # the nearest ratio that divides among devices
            for kv_ratios in (divisible, ratios):
                ratio = lowest_ratio(names[-1:], kv_ratios)
                if ratio is not None:
                    return kv_ratios | {names[-1]: ratio}
        return ratios

    @cached_property
    def now(self) -> Costs:
        """The costs of the unchanged model."""
        return costs_of(self.model)

    def _counts(self, name: str) -> list[int]:
        return [layer.count(RATIOS[name][1]) for layer in self.removable(name).values()]

    def _tries(self, names: Sequence[str]) -> list[float]:
        """Returns the ratios at which another unit is removed."""
        tries = {0.0}
        for name in names:
            counts = self._counts(name)
            for count in set(counts if self.amount.ranking == "layer" else [sum(counts)]):
                tries.update(number / count for number in range(count))
        return sorted(tries)

    def _highest(self, name: str) -> float:
        """Returns the highest ratio of a kind that leaves `min_units` in every module, or 0."""
        return min((max(count - self.amount.min_units, 0) / count for count in self._counts(name)), default=0.0)

    def cost(self, cut: Cut, target: str) -> int:
        """Returns the value that a budget limits, after a cut."""
        if target == "params":
            return cut.parameters[1]
        if target == "bytes":
            named = self.model.named_parameters()
            return sum(math.prod(size_after(cut.cuts, name, p.shape)) * p.element_size() for name, p in named)
        value: int = getattr(self.costs(cut)[1], target)
        return value


def _subset(units: UnitsByModule, names: Iterable[str]) -> dict[str, Units]:
    return {name: units[name] for name in names}


def _rounded(units: Units, num_kept: int, num_first: int, step: int, amount: Amount, name: str) -> int:
    """Returns the rounded number of units to keep in a module, for a named ratio."""
    per, at_most = RATIOS[name][1], name in amount.open_ratios
    count, channels, length = units.count(per), units.kind in ("channel", "residual", "token"), unit_length(units, per)
    if amount.round_to == "auto" and length and (channels or not at_most):
        grouped = per == "head" and units.count("kv_head") < count and not channels
        in_step = units.count("kv_head") if grouped else 1  # every KV head loses the same number of query heads
        num_rounded = round_units(
            num_kept, num_first, count, amount.min_units, length, math.lcm(step, in_step), allow_more=not at_most
        )
        if num_rounded is not None:
            return num_rounded
    multiple = math.lcm(1 if amount.round_to == "auto" else amount.round_to, step) if channels else 1
    return min(-(-num_kept // multiple) * multiple, count)


@dataclass(frozen=True)
class Baseline:
    """Counts of a model before pruning, so that rounds of an amount do not compound.

    Attributes:
        counts: Number of prunable units by ratio name and module.
        figure: Value of the budget's metric.
    """

    counts: dict[str, dict[str, int]]
    figure: int | None

    @classmethod
    def of(cls, search: RatioSearch) -> "Baseline":
        """Returns the counts of the model of a search."""
        counts = {
            name: {layer: of_layer.count(per) for layer, of_layer in search.removable(name).items()}
            for name, (_, per) in search.amount.requested.items()
        }
        return cls(counts, getattr(search.now, search.amount.target) if search.amount.target else None)

    def part(self, search: RatioSearch, progress: float) -> RatioSearch | None:
        """Returns a search for the amount due at a progress in 0..1, or None if nothing is due.

        Ratios refer to the original counts and each part is rounded by them, so that all rounds together equal one event.
        """
        amount = search.amount
        changes: dict[str, Any] = {name: progress * ratio for name, ratio in amount.ratios.items()}
        if amount.target is not None and self.figure is not None:
            requested = getattr(amount, amount.target)
            goal = int(requested * self.figure) if isinstance(requested, float) else int(requested)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= (getattr(search.now, amount.target) or 0):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        part = search.part(replace(amount, **changes), self.counts)
        return part if amount.target is not None or part.choose(part.equal_scores(), part.amount.ratios, part.amount) else None


def first_within(count: int, cost: Callable[[int], int], limit: int) -> int | None:
    """Finds the first index at which a falling cost is within a limit, or None.

    Alternates between linear interpolation and bisection.

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
        if (current := cost(middle)) <= limit:
            high, below = middle, current
        else:
            low, above = middle, current
        halve = not halve and high - low > 8
    return high


def width_notes(cut: Cut, requested: Mapping[str, int]) -> list[tuple[UnitKind, str]]:
    """Returns the unit kind and a note for each new width of rows of at least 256 entries.

    Args:
        cut: Cut of the units to remove.
        requested: Number of units to keep by module, before width rounding.
    """
    notes = dict[tuple[UnitKind, str], None]()
    for name in cut.units:
        units, kept, length = cut.all_units[name], cut.after[name][0], unit_length(cut.all_units[name])
        if units.count() * length >= MULTIPLES[0]:
            note = "no multiple of 32 is near enough"
            if (multiple := multiple_of(kept * length)) > 1:
                note = f"a multiple of {multiple}"
            if requested[name] != kept:
                note = f"rounded from {requested[name]:,} to {note}" if multiple > 1 else f"requested {requested[name]:,}; {note}"
            rows = "" if length == 1 else f"head dimension {length}, rows of {kept * length:,}, "
            notes[units.kind, f"{PLURAL[units.kind]}: {kept:,} ({rows}{note})"] = None
    return list(notes)
