"""Finds the places of a model that may keep less, the numbers of units that they may keep, and what each unit costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.model.figures import kv_cache_bytes
from billhook.model.linears import is_linear
from billhook.pruning.choice import ranked
from billhook.pruning.cuts import Cut, coupled, find_cut
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.units.units import UnitKind, Units

EIGHTHS = 8
"""Levels are measured at so many parts of a place."""


@dataclass(frozen=True)
class Place:
    """Feed-forward channels, or KV heads with the query heads that they serve, of which a place may keep fewer.

    Attributes:
        names: The places that lose the same units; nearly always one.
        kind: The kind of the units.
        count: How many there are now; of an attention, KV heads.
        allowed: The numbers of them that may be kept, falling, from all on.
        each: What one unit costs: parameters, bytes, or bytes of the key/value cache per token, as the budget says.
        times: Numbers of units, rising, each with what they cost by the clock, where the budget is one of time.
        merges: The numbers to which KV heads may be merged, where the budget is one of their cache.
    """

    names: tuple[str, ...]
    kind: UnitKind
    count: int
    allowed: tuple[int, ...]
    each: int
    times: tuple[tuple[int, int], ...] = ()
    merges: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the first place."""
        return self.names[0]

    def cost(self, kept: int) -> int:
        """Returns what is left of the budget's target in this place where it keeps so many units."""
        if not self.times:
            return kept * self.each
        numbers, times = zip(*self.times, strict=True)
        return round(float(np.interp(kept, numbers, times)))

    def saves(self, kept: int) -> int:
        """Returns by how much less is left where it keeps so many units instead of all."""
        return self.cost(self.count) - self.cost(kept)

    def levels(self) -> tuple[int, ...]:
        """Returns the numbers to keep that are tried: nearest to eighths of all, and where heads merge, falling, from all on."""
        wanted = [self.count * part / EIGHTHS for part in range(EIGHTHS, 0, -1)]
        if len(self.allowed) <= EIGHTHS:
            return self.allowed
        near = {min(self.allowed, key=lambda kept: abs(kept - one)) for one in wanted}
        return tuple(sorted(near | set(self.merges), reverse=True))


def find_places(search: Search, target: str) -> list[Place]:
    """Finds the places that may keep less for a target, with what each unit costs; refuses a model without any.

    Left whole are protected places, those whose units something else than linears of their own reads, and kinds of units that the
    model's class does not run without.
    """
    model, amount, free = search.model, search.amount, search.free()
    sets = [names for names in coupled(free) if all(readable(model, free[name]) for name in names)]
    found, taken = list[Place](), set[str]()
    for names, each in zip(sets, _unit_costs(search, sets, target), strict=True):
        one, readers = free[names[0]], {reader for name in names for reader in free[name].readers}
        allowed = _allowed(one.count("kv_head"), amount.min_units, search.step(names[0]) if one.kind == "channel" else 1)
        if len(allowed) > 1 and each > 0 and not readers & taken:
            caches = target == "kv_cache_bytes" and one.kind == "head"
            merges = tuple(kept for kept in allowed[1:] if caches and allowed[0] % kept == 0)
            found.append(Place(tuple(names), one.kind, one.count("kv_head"), allowed, each, merges=merges))
            taken |= readers
    if not found:
        raise ValueError(
            f"{target}: no place of this {type(model).__name__} may keep less, of channels or KV heads that linears alone read"
        )
    refused = {kind: _refusal(search, found, kind) for kind in dict.fromkeys(place.kind for place in found)}
    if all(refused.values()):
        raise ValueError(f"{target}: {next(iter(refused.values()))}")
    return [place for place in found if not refused[place.kind]]


def _refusal(search: Search, places: Sequence[Place], kind: UnitKind) -> str:
    """Says why the model's class does not run with as few units of a kind as may be; empty if it does."""
    own = {name: list(range(p.count - p.allowed[-1])) for p in places if p.kind == kind for name in p.names}
    try:
        tried(search.model, cut_of(search, own))
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
    mean = torch.stack([scores[name].double() for name in place.names]).mean(0)
    lowest = sorted(ranked(one, mean)[: place.count - kept])
    return {name: units[name].query_heads(lowest) if one.kind == "head" else lowest for name in place.names}


def removed(
    places: Sequence[Place], units: Mapping[str, Units], scores: Mapping[str, Tensor], kept: Mapping[str, int]
) -> dict[str, list[int]]:
    """Returns all units that go, by place, where places keep so many, given by the first of their names."""
    return {
        name: own
        for place in places
        for name, own in gone(place, units, scores, kept.get(place.name, place.count)).items()
    }  # fmt: skip


def _without_one(search: Search, names: Sequence[str]) -> Cut | None:
    """Finds what is removed with one unit; None where that may not be, as under a norm that spans all heads."""
    try:
        return cut_of(search, {name: [0] for name in names})
    except ValueError:
        return None


def cut_of(search: Search, numbers: Mapping[str, list[int]]) -> Cut:
    """Finds what is removed with channels and KV heads."""
    return find_cut(search.model, search.structure, search.units, numbers, "kv_head")


def _allowed(count: int, least: int, step: int) -> tuple[int, ...]:
    """Returns the numbers that may be kept, falling.

    >>> _allowed(10, 1, 4)
    (10, 8, 4)
    """
    return tuple(kept for kept in range(count, 0, -1) if kept == count or (kept % step == 0 and kept >= least))


def _unit_costs(search: Search, sets: Sequence[list[str]], target: str) -> list[int]:
    """Counts what one unit (of attentions, one KV head) of places that lose them together costs."""
    if target == "kv_cache_bytes":
        return _cache_costs(search, sets)
    parameters = dict(search.model.named_parameters())

    def cost(names: list[str]) -> int:
        total, cut = 0, _without_one(search, names)
        cuts = {} if cut is None else cut.cuts
        for name in {name for name, _ in cuts if name in parameters}:
            whole = parameters[name]
            left = math.prod(len(cuts.get((name, dim), range(size))) for dim, size in enumerate(whole.shape))
            total += (whole.numel() - left) * (whole.element_size() if target == "bytes" else 1)
        return total

    return [cost(names) for names in sets]


def _cache_costs(search: Search, sets: Sequence[list[str]]) -> list[int]:
    """Counts the bytes of cache of one KV head: an equal share where all are alike, or else by trying each place."""
    units, now = search.units, kv_cache_bytes(search.model) or 0
    every = sum(one.count("kv_head") for one in units.values() if one.kind == "head")
    costs = list[int]()
    for names in sets:
        cut = _without_one(search, names) if units[names[0]].kind == "head" else None
        if cut is None:
            costs.append(0)
            continue
        each = now - (kv_cache_bytes(tried(search.model, cut)) or 0)
        if each * every == now * len(names):
            one = each // len(names)
            return [one * len(own) if units[own[0]].kind == "head" and _without_one(search, own) else 0 for own in sets]
        costs.append(each)
    return costs
