"""Lets attentions with grouped queries keep fewer query heads of each KV head: which numbers are tried, and what goes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from billhook.importance.base import Importance
from billhook.importance.score import score
from billhook.units.units import Units

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
