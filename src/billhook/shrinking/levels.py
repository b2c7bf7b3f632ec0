"""Finds the places of a model that may keep less, the numbers of units that they may keep, and what each unit costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.model.linears import is_linear
from billhook.pruning.choice import ranked
from billhook.pruning.cuts import coupled
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.pruning.widths import suits
from billhook.shrinking.costs import (
    Pair,
    called,
    cut_of,
    each_of,
    eighths,
    heads_gone,
    one_of_each,
    pairs_of,
    query_costs,
    unit_costs,
)
from billhook.units.units import UnitKind, Units


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

    def repriced(self, units: Mapping[str, Units], saved: Callable[[dict[str, list[int]]], int]) -> "Place":
        """Returns the same place at other prices.

        Args:
            units: The units of all places.
            saved: Returns by how much less is left without some.
        """
        query = saved({name: one_of_each(units[name]) for name in self.names}) // self.pairs[-1][0] if self.pairs else 0
        if self.pairs and self.pairs[-1][0] == 1:
            return replace(self, each=self.pairs[-1][1] * query, query=query)
        return replace(self, each=saved({name: units[name].query_heads([0]) for name in self.names}), query=query)

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
