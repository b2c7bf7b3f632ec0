"""Third stage of a search: selects, plans, and repairs the best candidates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import numpy as np

from billhook.importance.score import make_run
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Perplexity
from billhook.shrinking.knapsack import cost, fill_budget
from billhook.shrinking.measurement import Measurement
from billhook.shrinking.modules import unit_counts
from billhook.shrinking.result import Budget, Candidate, Search
from billhook.shrinking.scope import CURVE
from billhook.shrinking.shrink_plan import ShrinkPlan, plan_choice, simulated
from billhook.shrinking.space import (
    Point,
    best_point,
    evenly_sized,
    initial_points,
    make_slots,
    neighbor,
    single_kind_points,
    size_costs,
    uniform_points,
)

SIZES = 64
"""Number of sizes that a search for a quality budget considers."""
TRIES = 20
"""Attempts per new candidate before a generation ends early."""
NEAR = 1.25
"""Largest loss of a finalist before repair, relative to the best: repair can change the ranking."""
MOST = 2
"""Maximum number of candidates to repair."""


@dataclass(frozen=True)
class SearchResult:
    """The candidate that a search selected within a limit.

    Attributes:
        kept: Number of kept units by module.
        planned: The plans, with repaired weights.
        limit: The limit.
        curve: Candidates of other sizes.
        tried: Candidates that were measured within the limit.
        ratio: Perplexity relative to the dense model, for a quality budget.
    """

    kept: dict[str, int]
    planned: ShrinkPlan
    limit: int
    curve: list[Candidate]
    tried: list[Candidate]
    ratio: float | None = None


def select_for_budget(
    measurement: Measurement,
    budget: Budget,
    repair_batches: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
) -> SearchResult:
    """Selects the best repaired candidate within a budget.

    For a quality budget, it finds the smallest size at which the repaired model meets the perplexity ratio. Bisection on
    assembled variants finds the size to start from. From there, smaller sizes are searched and repaired while they are good
    enough, or else larger ones until one is.

    Args:
        measurement: Losses of the variants.
        budget: The budget.
        repair_batches: Batches for repairing candidates.
        held_out: Batches for measuring perplexity, as dictionaries; their loss is the model's own.
        repair: Settings of the refits; None keeps the old weights.
        search: Search settings.
        seed: Seed of the evolutionary search.

    Raises:
        ValueError: If no model meets a quality budget.
    """
    scope, max_loss = measurement.scope, budget.max_loss
    model, within = scope.model, partial(search_within, measurement, repair_batches, repair, search, seed)
    if max_loss is None:
        best: SearchResult | None = within(scope.limit)
    else:
        sizes = sorted({*np.linspace(scope.least, scope.now, SIZES + 1)[:-1].astype(int).tolist()})
        perplexity = Perplexity(model, [make_run(model, {}, batch) for batch in held_out], measurement.divergence.broadcast)

        def good(number: int) -> SearchResult | None:
            chosen = within(sizes[number])
            with simulated(model, chosen.planned):
                ratio = perplexity.ratio()
            return replace(chosen, ratio=ratio) if ratio <= max_loss else None

        number, high = 0, len(sizes) - 1  # the smallest size at which assembled variants meet the ratio
        while number < high:
            middle = (number + high) // 2
            point, ratio = best_point(measurement.spaces, sizes[middle]), math.inf
            if point is not None:
                with measurement.cache.assembled(measurement.kept(point)):
                    ratio = perplexity.ratio()
            number, high = (number, middle) if ratio <= max_loss else (middle + 1, high)
        best = good(number)
        while best is not None and number > 0 and (smaller := good(number - 1)) is not None:
            best, number = smaller, number - 1
        while best is None and number < len(sizes) - 1:
            best, number = good(number + 1), number + 1
    if best is None:
        raise ValueError(
            f"max_loss={max_loss} is out of reach: a model of {sizes[-1]:,} parameters already exceeds it. Raise max_loss."
        )
    measurement.cache.forget()
    return best


def search_within(
    measurement: Measurement, repair_batches: Sequence[Any], repair: RepairConfig | None, search: Search, seed: int, limit: int
) -> SearchResult:
    """Searches within a limit and repairs the best candidates.

    Returns the one with the lowest loss after repair. Candidates are compared before any block-wise reconstruction, which takes
    longer than their repair.
    """
    choices, curve, tried = choose(measurement, search, seed, limit)
    if repair is None or len(choices) == 1:
        return SearchResult(choices[0], plan_choice(measurement, limit, choices[0], repair_batches, repair), limit, curve, tried)
    refit, losses, results = replace(repair, match=None), [], []
    for kept in choices:
        planned = plan_choice(measurement, limit, kept, repair_batches, refit)
        results.append(SearchResult(kept, planned, limit, curve, tried))
        with simulated(measurement.scope.model, planned):
            losses.append(measurement.divergence.mean())
    best = results[losses.index(min(losses))]
    if repair.match is None:
        return best
    return replace(best, planned=plan_choice(measurement, limit, best.kept, repair_batches, repair))


def choose(
    measurement: Measurement, search: Search, seed: int, limit: int
) -> tuple[list[dict[str, int]], list[Candidate], list[Candidate]]:
    """Returns the finalists, candidates of other sizes, and all measured candidates.

    With uniform modules there may be several finalists, the best first; repair can change their ranking.
    """
    scope, losses, spaces, progress = measurement.scope, measurement.losses, measurement.spaces, measurement.progress
    progress.enter("searching")
    start = initial_points(spaces, limit, sorted(scope.blocks.removable, key=lambda block: losses[block.name][-1]))
    more = limit - scope.now
    if scope.uniform:
        start += single_kind_points(scope.modules, losses, more)
    else:
        start += uniform_points(spaces[0], scope.modules, losses, more)
    # As in Týr-the-Pruner (Li et al., 2025, https://arxiv.org/abs/2503.09657), each mutation trades units between modules within
    # the budget, and the best measured point is the parent of the next generation.
    random, tried = Random(seed), {point: measurement.lost(point) for point in dict.fromkeys(start)}
    for _ in range(search.generations):
        best, new = min(tried, key=tried.__getitem__), set[Point]()
        for _ in range(TRIES * search.candidates):
            other = neighbor(spaces, limit, best, random)
            if len(new) < search.candidates and other is not None and other not in tried:
                new.add(other)
        if not new:
            break
        tried |= {point: measurement.lost(point) for point in sorted(new)}
    measured = dict(sorted(tried.items(), key=lambda item: item[1]))
    kept = [_filled(measurement, point, limit) for point in _finalists(measurement, measured)]
    progress.steps = progress.done + CURVE
    curve = {point: measurement.lost(point) for point in evenly_sized(spaces, CURVE)}
    return kept, _candidates(measurement, curve), _candidates(measurement, measured)


def _finalists(measurement: Measurement, measured: Mapping[Point, float]) -> list[Point]:
    """Returns the points to repair, whose blocks can be removed.

    Measured points are sorted by loss. With uniform modules these are the best, and the best that prunes other kinds at a similar
    loss. Raises a ValueError if there are none.
    """
    scope, order = measurement.scope, list(measured)
    first = next((number for number, point in enumerate(order) if not _refusal(measurement, point)), None)
    if first is None:
        raise ValueError(_refusal(measurement, order[-1]))
    if not scope.uniform:
        return [order[first]]
    best = dict[frozenset[str], Point]()
    for point in order[first:]:
        kept = measurement.kept(point)
        blocks = {"block"} if measurement.spaces[point[0]].removed else set()
        kinds = frozenset(blocks | {module.kind for module in scope.modules if 0 < kept[module.name] < module.count})
        best.setdefault(kinds, point)
    near = [point for point in best.values() if point == order[first] or measured[point] <= NEAR * measured[order[first]]]
    return [point for point in near[:MOST] if not _refusal(measurement, point)]


def _refusal(measurement: Measurement, point: Point) -> str:
    """Returns why the blocks of a point cannot be removed together; empty if they can."""
    blocks = measurement.scope.blocks
    removed = blocks.removed(measurement.kept(point))
    return blocks.refusal(removed) if removed else ""


def _filled(measurement: Measurement, point: Point, limit: int) -> dict[str, int]:
    """Adds units, also between levels, up to the limit; removed blocks stay removed."""
    scope, kept = measurement.scope, measurement.kept(point)
    spare = limit - measurement.spaces[point[0]].left(point[1])
    present = [module for module in scope.modules if kept[module.name]]
    slots = make_slots(present, measurement.losses, scope.uniform)
    chosen = tuple(slot.kept.index(kept[slot.names[0]]) for slot in slots)
    numbers = fill_budget(slots, chosen, cost(slots, chosen) + max(spare, 0), size_costs(present, scope.uniform))
    more = dict(kept)
    for slot, number in zip(slots, numbers, strict=True):
        more |= dict.fromkeys(slot.names, number)
    for module in present:
        spare -= module.cost(more[module.name]) - module.cost(kept[module.name])
    return scope.rounded(more, spare)


def _candidates(measurement: Measurement, losses: Mapping[Point, float]) -> list[Candidate]:
    """Returns measured points as candidates."""
    candidates = []
    for point, lost in losses.items():
        space, kept = measurement.spaces[point[0]], measurement.kept(point)
        by_module = {name: stay for name, (_, stay) in unit_counts(measurement.scope.modules, kept).items()}
        candidates.append(Candidate(kept | by_module, space.left(point[1]), space.predicted(point[1]), lost))
    return candidates
