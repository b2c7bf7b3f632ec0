"""Counts what one unit of a place costs, and of attentions with grouped queries one query head, of which fewer may be kept."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from billhook.importance.score import Importance, score
from billhook.model.figures import kv_cache_bytes
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.units.units import Per, Units

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
