"""Finds the places of a model that may keep less, the numbers of units that they may keep, and what each unit costs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.importance.score import Importance, score
from billhook.model.figures import kv_cache_bytes
from billhook.model.linears import is_linear
from billhook.pruning.amount import suits
from billhook.pruning.choice import ranked
from billhook.pruning.cuts import Cut, coupled, find_cut
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.units.units import Per, UnitKind, Units

EIGHTHS = 8
"""Levels are measured at so many parts of a place."""
Pair = tuple[int, int]
"""KV heads, and query heads of each."""
Option = TypeVar("Option")


def eighths(options: Sequence[Option], size: Callable[[Option], float], whole: float) -> set[Option]:
    """Returns the options that are tried: all of few, or else those whose sizes are nearest to eighths of the whole.

    >>> sorted(eighths(range(100), lambda one: one, 80))
    [10, 20, 30, 40, 50, 60, 70, 80]
    """
    if len(options) <= EIGHTHS:
        return set(options)
    wanted = [whole * part / EIGHTHS for part in range(EIGHTHS, 0, -1)]
    return {min(options, key=lambda one: abs(size(one) - part)) for part in wanted}


def pairs_of(kv_heads: Sequence[int], each: int, cost: Callable[[Pair], int]) -> tuple[Pair, ...]:
    """Returns the pairs that are tried, rising in cost: of whole groups, and of groups with fewer query heads, some of each.

    Args:
        kv_heads: The numbers of KV heads that may be kept, falling, from all on.
        each: The query heads of each.
        cost: Returns what a pair costs.

    >>> pairs_of((2, 1), 2, lambda pair: pair[0] * (1 + pair[1]))
    ((1, 1), (1, 2), (2, 1), (2, 2))
    """
    whole = [(kept, each) for kept in kv_heads]
    fewer = [(kept, own) for kept in kv_heads for own in range(each - 1, 0, -1)]
    found = [pair for some in (whole, fewer) for pair in eighths(some, cost, cost(whole[0]))]
    return tuple(sorted(found, key=lambda pair: (cost(pair), pair)))


def each_of(units: Units) -> int:
    """Returns how many query heads each KV head of an attention serves; 1 of other units, and where they are not as many."""
    serving = set(np.bincount(units.kv_of).tolist())
    return serving.pop() if units.kind == "head" and len(serving) == 1 else 1


def one_of_each(units: Units) -> list[int]:
    """Returns one query head of each KV head of an attention."""
    return [units.query_heads([kv])[0] for kv in range(units.count("kv_head"))]


def heads_gone(units: Units, pair: Pair, kv_heads: Sequence[int], heads: Sequence[int]) -> list[int]:
    """Returns the query heads that go where a pair stays: all of some KV heads, and some of each other.

    Args:
        units: The heads of an attention.
        pair: The pair.
        kv_heads: All KV heads, in the order in which they go.
        heads: All query heads, in the order in which those of one KV head go.
    """
    number = len(kv_heads) - pair[0]
    found = units.query_heads(kv_heads[:number])
    for kv in kv_heads[number:]:
        own = [head for head in heads if units.kv_of[head] == kv]
        found += own[: len(own) - pair[1]]
    return sorted(found)


def called(name: str) -> str:
    """Returns the name under which choices and scores say what query heads of an attention are."""
    return f"{name} query heads"


def query_scores(
    model: PreTrainedModel, units: Mapping[str, Units], names: Iterable[str], importance: Importance, batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Scores the query heads of some attentions; nothing is run where there are none."""
    own = {name: units[name] for name in names}
    found = score(model, own, importance, batches) if own else {}
    return {called(name): scores for name, scores in found.items()}


def cut_of(search: Search, numbers: Mapping[str, list[int]], per: Per = "kv_head") -> Cut:
    """Finds what is removed with channels and KV heads, or query heads."""
    return find_cut(search.model, search.structure, search.units, numbers, per)


def unit_costs(search: Search, sets: Sequence[list[str]], target: str) -> list[int]:
    """Counts what one unit (of attentions, one KV head) of places that lose them together costs."""
    if target == "kv_cache_bytes":
        return _cache_costs(search, sets)
    return [_saved(search, _if_any(search, {name: [0] for name in names}), target) for names in sets]


def query_costs(search: Search, sets: Sequence[list[str]], target: str) -> list[int]:
    """Counts what one query head costs; 0 where there is one for each KV head, it saves nothing, or may not go."""
    units, found = search.units, list[int]()
    for names in sets:
        grouped = target != "kv_cache_bytes" and all(each_of(units[name]) > 1 for name in names)
        cut = _if_any(search, {name: one_of_each(units[name]) for name in names}, "head") if grouped else None
        found.append(_saved(search, cut, target) // units[names[0]].count("kv_head"))
    return found


def _if_any(search: Search, numbers: Mapping[str, list[int]], per: Per = "kv_head") -> Cut | None:
    """Finds what is removed with some units; None where that may not be, as under a norm that spans all heads."""
    try:
        return cut_of(search, numbers, per)
    except ValueError:
        return None


def _saved(search: Search, cut: Cut | None, target: str) -> int:
    """Counts the parameters, or bytes, that go with a cut."""
    parameters, cuts, total = dict(search.model.named_parameters()), {} if cut is None else cut.cuts, 0
    for name in {name for name, _ in cuts if name in parameters}:
        whole = parameters[name]
        left = math.prod(len(cuts.get((name, dim), range(size))) for dim, size in enumerate(whole.shape))
        total += (whole.numel() - left) * (whole.element_size() if target == "bytes" else 1)
    return total


def _cache_costs(search: Search, sets: Sequence[list[str]]) -> list[int]:
    """Counts the bytes of cache of one KV head: an equal share where all are alike, or else by trying each place."""
    units, now = search.units, kv_cache_bytes(search.model) or 0
    every = sum(one.count("kv_head") for one in units.values() if one.kind == "head")
    costs = list[int]()
    ones = [{name: [0] for name in names} if units[names[0]].kind == "head" else None for names in sets]
    for names, one in zip(sets, ones, strict=True):
        cut = None if one is None else _if_any(search, one)
        if cut is None:
            costs.append(0)
            continue
        each = now - (kv_cache_bytes(tried(search.model, cut)) or 0)
        if each * every == now * len(names):
            share = each // len(names)
            return [0 if own is None or _if_any(search, own) is None else share * len(own) for own in ones]
        costs.append(each)
    return costs


@dataclass(frozen=True)
class Place:
    """Feed-forward channels, or KV heads with the query heads that they serve, of which a place may keep fewer.

    Where an attention may keep fewer query heads of each KV head, too, its numbers stand for pairs of numbers of both.

    Attributes:
        names: The places that lose the same units; nearly always one.
        kind: The kind of the units.
        count: How many there are now; of an attention, KV heads, or pairs.
        allowed: The numbers of them that may be kept, falling, from all on.
        each: What one unit costs, of an attention one KV head with its query heads: parameters, bytes, or bytes of the key/value
            cache per token, as the budget says.
        times: Numbers of units, rising, each with what they cost by the clock, where the budget is one of time.
        merges: The numbers to which KV heads may be merged, where the budget is one of their cache.
        pairs: What the numbers from 1 on stand for, rising in cost: KV heads, and query heads of each.
        query: What one query head costs, where there are pairs.
    """

    names: tuple[str, ...]
    kind: UnitKind
    count: int
    allowed: tuple[int, ...]
    each: int
    times: tuple[tuple[int, int], ...] = ()
    merges: tuple[int, ...] = ()
    pairs: tuple[Pair, ...] = ()
    query: int = 0

    @property
    def name(self) -> str:
        """The name of the first place."""
        return self.names[0]

    def cost(self, kept: int) -> int:
        """Returns what is left of the budget's target in this place where it keeps so many units."""
        if self.pairs and kept:
            return self._paid(self.pairs[kept - 1])
        if not self.times:
            return kept * self.each
        numbers, times = zip(*self.times, strict=True)
        return round(float(np.interp(kept, numbers, times)))

    def saves(self, kept: int) -> int:
        """Returns by how much less is left where it keeps so many units instead of all."""
        return self.cost(self.count) - self.cost(kept)

    def levels(self) -> tuple[int, ...]:
        """Returns the numbers to keep that are tried: nearest to eighths of all, and where heads merge, falling, from all on."""
        if self.pairs:
            return self.allowed
        return tuple(sorted(eighths(self.allowed, float, self.count) | set(self.merges), reverse=True))

    def holds(self, more: int, fewer: int) -> bool:
        """Tells whether all units of which one number stays are there where another one does."""
        if not self.pairs:
            return more >= fewer
        return all(one >= other for one, other in zip(self.pairs[more - 1], self.pairs[fewer - 1], strict=True))

    def told(self, kept: int) -> dict[str, tuple[int, int]]:
        """Returns by name how many units there are and stay; of pairs, KV heads, and query heads under a name of theirs."""
        if not self.pairs:
            return dict.fromkeys(self.names, (self.count, kept))
        (now, size), (kv, each) = self.pairs[-1], self.pairs[kept - 1] if kept else (0, 0)
        return dict.fromkeys(self.names, (now, kv)) | dict.fromkeys(map(called, self.names), (now * size, kv * each))

    def paired(self, size: int, query: int) -> "Place":
        """Returns the same place, which may keep fewer of so many query heads of each KV head, each at a price."""
        each = self.each if self.count > 1 else size * query  # of one KV head, which always stays, query heads alone count
        priced = replace(self, each=each, pairs=((self.count, size),), query=query)
        pairs = pairs_of(self.allowed, size, priced._paid)
        return replace(priced, count=len(pairs), allowed=tuple(range(len(pairs), 0, -1)), pairs=pairs)

    def unpaired(self) -> "Place":
        """Returns the same place, which may keep fewer KV heads alone."""
        kv_heads = tuple(sorted({kept for kept, _ in self.pairs}, reverse=True))
        return replace(self, count=kv_heads[0], allowed=kv_heads, pairs=(), query=0) if self.pairs else self

    def _paid(self, pair: Pair) -> int:
        return pair[0] * (self.each - (self.pairs[-1][1] - pair[1]) * self.query)


def find_places(search: Search, target: str, query_heads: bool = True, alike: bool = False) -> list[Place]:
    """Finds the places that may keep less for a target, with what each unit costs; refuses a model without any.

    Left whole are protected places, those whose units something else than linears of their own reads, and kinds of units that the
    model's class does not run without.

    Args:
        search: The model, and its units.
        target: What is limited.
        query_heads: Whether query heads may go from KV heads that stay, where that saves something.
        alike: Whether all attentions are to keep as many KV heads: then numbers that engines can divide among devices, where
            numbers are left to us, and channels make up for what they do not save.
    """
    model, amount, free = search.model, search.amount, search.free()
    sets = [names for names in coupled(free) if all(readable(model, free[name]) for name in names)]
    queries = query_costs(search, sets, target) if query_heads else [0] * len(sets)
    found, taken = list[Place](), set[str]()
    for names, each, query in zip(sets, unit_costs(search, sets, target), queries, strict=True):
        one, readers = free[names[0]], {reader for name in names for reader in free[name].readers}
        allowed = _allowed(one.count("kv_head"), amount.min_units, search.step(names[0]) if one.kind == "channel" else 1)
        if alike and amount.round_to == "auto" and one.kind == "head" and target != "kv_cache_bytes":
            allowed = tuple(kept for kept in allowed if kept == allowed[0] or suits(kept))
        if (len(allowed) > 1 and each > 0 or len(allowed) == 1 and query > 0) and not readers & taken:
            caches = target == "kv_cache_bytes" and one.kind == "head"
            merges = tuple(kept for kept in allowed[1:] if caches and allowed[0] % kept == 0)
            plain = Place(tuple(names), one.kind, one.count("kv_head"), allowed, each, merges=merges)
            found.append(plain.paired(each_of(one), query) if query else plain)
            taken |= readers
    refused = {kind: _refusal(search, found, kind) for kind in dict.fromkeys(place.kind for place in found)}
    if found and all(refused.values()):
        raise ValueError(f"{target}: {next(iter(refused.values()))}")
    found = _as_it_runs(search, [place for place in found if not refused[place.kind]])
    if not found:
        raise ValueError(
            f"{target}: no place of this {type(model).__name__} may keep less, of channels or KV heads that linears alone read"
        )
    return found


def _refusal(search: Search, places: Sequence[Place], kind: UnitKind) -> str:
    """Says why the model's class does not run with as few channels, or KV heads, as may be; empty if it does."""
    own = [place.unpaired() for place in places if place.kind == kind]
    return _why_not(search, [(place, place.allowed[-1]) for place in own])


def _as_it_runs(search: Search, places: Sequence[Place]) -> list[Place]:
    """Returns places that lose no query heads of KV heads that stay, where the model's class does not run without those."""
    fewest = [(p, min(p.allowed, key=lambda kept: (p.pairs[kept - 1][1], -kept))) for p in places if p.pairs]
    if not fewest or not _why_not(search, fewest):
        return list(places)
    return [place for place in map(Place.unpaired, places) if len(place.allowed) > 1]


def _why_not(search: Search, kept: Sequence[tuple[Place, int]]) -> str:
    """Says why the model's class does not run with so many units in places; empty if it does."""
    gone = {name: own for place, number in kept for name, own in any_gone(place, search.units, number).items()}
    try:
        tried(search.model, cut_of(search, gone, "head"))
    except ValueError as error:
        return str(error)
    return ""


def readable(model: PreTrainedModel, units: Units) -> bool:
    """Tells whether linears, and nothing else, read the units of a place."""
    return bool(units.readers) and all(is_linear(model.get_submodule(reader)) for reader in units.readers)


def gone(place: Place, units: Mapping[str, Units], scores: Mapping[str, Tensor], kept: int) -> dict[str, list[int]]:
    """Returns the units, of attentions query heads, that go where a place keeps so many: those of the lowest scores."""
    if kept == place.count:
        return {}
    one = units[place.name]
    order = ranked(one, _mean(scores, place.names))
    if place.pairs:
        heads = ranked(one, _mean(scores, [called(name) for name in place.names]))
        return dict.fromkeys(place.names, heads_gone(one, place.pairs[kept - 1], order, heads))
    lowest = sorted(order[: place.count - kept])
    return {name: units[name].query_heads(lowest) if one.kind == "head" else lowest for name in place.names}


def told(places: Sequence[Place], kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns by name how many units there are and stay, where places keep so many, given by the first of their names."""
    return {name: own for place in places for name, own in place.told(kept[place.name]).items()}


def any_gone(place: Place, units: Mapping[str, Units], kept: int) -> dict[str, list[int]]:
    """Returns as many units as go where a place keeps so many, whichever these are."""
    flat = {name: torch.zeros(units[name].count("kv_head")) for name in place.names}
    flat |= {called(name): torch.zeros(units[name].count()) for name in place.names}
    return gone(place, units, flat, kept)


def _mean(scores: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.stack([scores[name].double() for name in names]).mean(0)


def removed(
    places: Sequence[Place], units: Mapping[str, Units], scores: Mapping[str, Tensor], kept: Mapping[str, int]
) -> dict[str, list[int]]:
    """Returns all units that go, by place, where places keep so many, given by the first of their names."""
    return {
        name: own
        for place in places
        for name, own in gone(place, units, scores, kept.get(place.name, place.count)).items()
    }  # fmt: skip


def _allowed(count: int, least: int, step: int) -> tuple[int, ...]:
    """Returns the numbers that may be kept, falling.

    >>> _allowed(10, 1, 4)
    (10, 8, 4)
    """
    return tuple(kept for kept in range(count, 0, -1) if kept == count or (kept % step == 0 and kept >= least))
