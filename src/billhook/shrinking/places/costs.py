"""Counts what one unit of a place costs, and one query head of an attention with grouped queries."""

import math
from collections.abc import Mapping, Sequence

from billhook.model.figures import kv_cache_bytes
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.shrinking.places.pairs import each_of, one_of_each
from billhook.units.units import Per


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
