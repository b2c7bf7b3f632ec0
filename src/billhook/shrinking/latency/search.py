"""Finds a model that is fast enough by the clock, not only by the table."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from billhook.repairs.repair import Repair
from billhook.shrinking.latency.table import Clock
from billhook.shrinking.smallest import Choosing, Found
from billhook.shrinking.work import Work

TRIES = 4
"""How often a limit is tried by the clock, and how often a model is searched for, each time within less or more."""
SLACK = 0.02
"""How much faster than asked a model may be, as a fraction of the dense model's time, before it is allowed more."""


def fast_enough(work: Work, most: float, clock: Clock, fitted: Sequence[Any], repair: Repair | None, choosing: Choosing) -> Found:
    """Searches for a model that takes no longer than is asked, timed before anything is cut.

    What places take together is not the sum of what they take alone. So the limit is first adjusted to how long the knapsack's
    choice takes, cut but not repaired; the search itself comes then, again within less if what it finds takes too long, or
    within more if that leaves some of the budget unused.

    Args:
        work: The model, measured, with its limit.
        most: The fraction of the dense model's time that it may take.
        clock: Measures models.
        fitted: Batches to repair on.
        repair: How it is repaired.
        choosing: Searches within a limit.

    Raises:
        ValueError: If none is fast enough.
    """
    asked, best = work.limit, None
    adjust(work, most, clock)
    low, high, too_slow = work.least, work.now, 1.0  # the most that was fast enough, and the least that was not, with its time
    for _ in range(TRIES):
        found = Found.within(work, fitted, repair, choosing)
        times = clock.times(found.planned.units, found.planned.blocks)
        if times.ratio <= most:
            best, low = replace(found, times=times), work.limit
        else:
            high, too_slow = work.limit, times.ratio
        if most - SLACK <= times.ratio <= most or high - low <= 1:
            break
        scaled = low if best is not None and too_slow < 1 else max(_scaled(work, times.ratio, most), work.least)
        work.limit = scaled if low < scaled < high or best is None else (low + high) // 2
    if best is None or best.times is None:
        raise ValueError(
            f"latency={most}: a model that should take {work.limit / work.now:.3f} of the dense model's time, by what places "
            f"take, was measured at {times.ratio:.3f}, {clock.workload}"
        )
    work.limit = asked
    return replace(best, times=replace(best.times, unused=unused(most, best.times.ratio, too_slow)))


def unused(most: float, ratio: float, too_slow: float) -> str:
    """Returns words for the share of a budget of time that is unused, and what the next larger model takes; empty if it is small.

    >>> unused(0.7, 0.6, 0.75), unused(0.7, 0.69, 0.75)
    ('0.10 of the budget is unused: the next larger model that was tried takes 0.750', '')
    """
    if most - ratio <= SLACK:
        return ""
    tried = "no larger model was tried" if too_slow >= 1 else f"the next larger model that was tried takes {too_slow:.3f}"
    return f"{most - ratio:.2f} of the budget is unused: {tried}"


def adjust(work: Work, most: float, clock: Clock) -> None:
    """Adjusts the limit of the work so that the knapsack's choice takes as long as is asked, or a little less."""
    low, high = work.least, work.now
    for _ in range(TRIES):
        planned = work.planned((), None, work.sum_chosen())
        ratio = clock.times(planned.units, planned.blocks).ratio
        if most - SLACK <= ratio <= most:
            return
        low, high = (low, work.limit) if ratio > most else (work.limit, high)
        scaled = _scaled(work, ratio, most)
        work.limit = scaled if low < scaled < high else (low + high) // 2
    work.limit = low


def _scaled(work: Work, ratio: float, most: float) -> int:
    """Returns the limit that would save what is asked, if as much of what it saves counts as did."""
    saved = (work.now - work.limit) * (1 - most + SLACK / 2) / max(1 - ratio, 1e-3)
    return work.now - round(saved)
