"""Finds the smallest model whose perplexity rises by no more than is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from billhook.importance.score import run_of
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Perplexity
from billhook.shrinking.planned import Planned, as_planned
from billhook.shrinking.shrunk import Choice, Times
from billhook.shrinking.space import best_point
from billhook.shrinking.work import Work

SIZES = 64
"""Into how many steps what may be removed is divided."""
Choosing = Callable[[], tuple[list[dict[str, int]], list[Choice], list[Choice]]]
"""Searches within a work's limit: how many units places keep, in one choice or several, choices of other sizes, and what was
measured."""


@dataclass(frozen=True)
class Found:
    """Holds what was chosen: how many units places keep, the plans with repaired weights, what else was measured."""

    kept: dict[str, int]
    planned: Planned
    curve: list[Choice]
    tried: list[Choice]
    ratio: float | None = None
    times: Times | None = None

    @classmethod
    def within(cls, work: Work, fitted: Sequence[Any], repair: RepairConfig | None, choosing: Choosing) -> "Found":
        """Searches within a work's limit, and repairs what is chosen as a whole; of several, takes what then loses least."""
        several, curve, tried = choosing()
        some = several if repair is not None else several[:1]
        found = [cls(kept, work.planned(fitted, repair, kept), curve, tried) for kept in some]
        return min(found, key=lambda one: one.lost(work)) if len(found) > 1 else found[0]

    def lost(self, work: Work) -> float:
        """Measures what the model loses once it is cut and repaired."""
        with as_planned(work.model, self.planned):
            return work.divergence.mean()


def smallest(
    work: Work, most: float, held_out: Sequence[Any], fitted: Sequence[Any], repair: RepairConfig | None, choosing: Choosing
) -> Found:
    """Finds the smallest size at which the model, repaired as a whole, has at most so many times its perplexity.

    Bisection on what the refitted places lose when they are put together says where to begin. From there sizes are searched and
    repaired one after the other: smaller ones as long as they are good enough, or else larger ones until one is. The limit of the
    work is that size in the end.

    Args:
        work: The model, measured.
        most: How many times the dense model's perplexity may be.
        held_out: Batches that it is measured on, as dictionaries; their losses are the model's own.
        fitted: Batches to repair on.
        repair: How it is repaired.
        choosing: Searches within a limit.

    Raises:
        ValueError: If not even the largest size is good enough.
    """
    sizes = _sizes(work)
    perplexity = Perplexity(work.model, [run_of(work.model, {}, batch) for batch in held_out], work.agreed)

    def good(number: int) -> Found | None:
        work.limit = sizes[number]
        found = Found.within(work, fitted, repair, choosing)
        ratio = _ratio(work, perplexity, found)
        return replace(found, ratio=ratio) if ratio <= most else None

    start = _first_met(work, sizes, most, perplexity)
    best, at = good(start), start
    while best is not None and at > 0 and (smaller := good(at - 1)) is not None:
        best, at = smaller, at - 1
    while best is None and at < len(sizes) - 1:
        best, at = good(at + 1), at + 1
    if best is None:
        raise ValueError(f"max_loss={most}: not even a model of {sizes[-1]:,} parameters meets it")
    work.limit = sizes[at]
    return best


def _sizes(work: Work) -> list[int]:
    """Returns sizes, from the smallest that can be reached to just below the whole."""
    return sorted({int(size) for size in np.linspace(work.least, work.now, SIZES + 1)[:-1]})


def _first_met(work: Work, sizes: Sequence[int], most: float, perplexity: Perplexity) -> int:
    """Returns the number of the smallest size that is good enough when refitted places are put together; or that of the last."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        point = best_point(work.spaces, sizes[middle])
        with work.library.assembled(work.spaces[point[0]].kept(point[1]) if point else {}):
            met = point is not None and perplexity.ratio() <= most
        low, high = (low, middle) if met else (middle + 1, high)
    return low


def _ratio(work: Work, perplexity: Perplexity, found: Found) -> float:
    """Measures the model as it would be if plans were carried out."""
    with as_planned(work.model, found.planned):
        return perplexity.ratio()
