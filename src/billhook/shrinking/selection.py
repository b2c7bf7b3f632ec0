"""Third stage of a search: selects, plans, and repairs the best candidates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from billhook.importance.score import make_run
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Perplexity, mean_over_sources
from billhook.shrinking.knapsack import cost, evolve, fill_budget
from billhook.shrinking.measurement import Measurement, single_kind_levels
from billhook.shrinking.modules import unit_counts
from billhook.shrinking.planning import ShrinkPlan, plan, simulated
from billhook.shrinking.result import Candidate, Times
from billhook.shrinking.scope import CURVE
from billhook.shrinking.search import Search
from billhook.shrinking.space import (
    Point,
    best_point,
    evenly_sized,
    finalists,
    initial_points,
    make_slots,
    neighbor,
    size_costs,
    uniform_points,
)
from billhook.shrinking.vocabulary import SmallerVocabularies, VocabularyLevel

SIZES = 64
"""Number of sizes that a search for a quality budget considers."""


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
        times: Measured times, for a latency budget.
        alone: By kind of unit, the remaining cost and the loss of pruning only this kind.
    """

    kept: dict[str, int]
    planned: ShrinkPlan
    limit: int
    curve: list[Candidate]
    tried: list[Candidate]
    ratio: float | None = None
    times: Times | None = None
    alone: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokensChoice:
    """A vocabulary, and the units that a search selected beside it.

    Attributes:
        levels: All vocabularies, the largest first.
        level: The chosen vocabulary.
        measurement: Losses of variants on batches in its tokens.
        result: The units, and candidates with their losses in bits per byte.
    """

    levels: Sequence[VocabularyLevel]
    level: VocabularyLevel
    measurement: Measurement
    result: SearchResult


Within = Callable[[int], SearchResult]
"""Searches within a limit."""


def search_within(
    measurement: Measurement,
    fitted: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    limit: int,
) -> SearchResult:
    """Searches within a limit and repairs the best candidates.

    Returns the one with the lowest loss after repair. Candidates are compared before any block-wise reconstruction, which takes
    longer than their repair.
    """
    choices, curve, tried = choose(measurement, search, seed, limit)
    if repair is None or len(choices) == 1:
        return SearchResult(choices[0], plan(measurement, limit, choices[0], fitted, repair), limit, curve, tried)
    refit, losses = replace(repair, match=None), list[float]()
    chosen = [SearchResult(kept, plan(measurement, limit, kept, fitted, refit), limit, curve, tried) for kept in choices]
    for result in chosen:
        with simulated(measurement.scope.model, result.planned):
            losses.append(measurement.divergence.mean())
    return matched(measurement, fitted, repair, chosen[losses.index(min(losses))])


def matched(measurement: Measurement, fitted: Sequence[Any], repair: RepairConfig | None, result: SearchResult) -> SearchResult:
    """Repairs a candidate again with `RepairConfig.match`, if it is set."""
    if repair is None or repair.match is None:
        return result
    return replace(result, planned=plan(measurement, result.limit, result.kept, fitted, repair))


def search_with_tokens(
    measurement: Measurement,
    vocabularies: SmallerVocabularies,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
) -> TokensChoice:
    """Searches for a vocabulary and for units beside it.

    Units are repaired on batches in the remaining tokens. Their estimated losses are those of variants, of which a repair leaves
    a part. This part is known once a candidate is repaired. The vocabulary is then chosen again by what would be left, until the
    choice stays the same. What the chosen units leave of the budget is filled with tokens, and only these units are reconstructed
    block-wise.
    """
    scope, progress, refit = measurement.scope, measurement.progress, repair and replace(repair, match=None)
    progress.enter("measuring smaller vocabularies")
    levels = vocabularies.measure(scope.model, held_out, scope.now - scope.limit)
    unrepaired, tried, losses = 1.0, dict[int, TokensChoice](), dict[int, float]()
    while (number := choose_level(measurement, levels, unrepaired)) not in tried:
        level = levels[number]
        limit = scope.limit + level.saved
        spelled = measurement.on(vocabularies.respell(held_out, level), limit)
        result = search_within(spelled, vocabularies.respell(fitted, level), refit, search, seed, limit)
        with simulated(scope.model, result.planned):
            divergence = spelled.divergence.by_source()
        losses[number] = mean_over_sources(level.with_units(divergence))
        result = replace(result, curve=[*map(level.beside, result.curve)], tried=[*map(level.beside, result.tried)])
        tried[number] = TokensChoice(levels, level, spelled, result)
        estimated = units_loss(measurement, limit)
        unrepaired = mean_over_sources(divergence) / estimated if estimated else unrepaired
    chosen = tried[min(losses, key=losses.__getitem__)]
    result, spelled = chosen.result, chosen.measurement
    level = vocabularies.filled(scope.model, held_out, chosen.level, result.limit - result.planned.left)
    if level is not chosen.level:
        spelled = measurement.on(vocabularies.respell(held_out, level), result.limit)
    result = matched(spelled, vocabularies.respell(fitted, level), repair, result)
    return replace(chosen, level=level, measurement=spelled, result=result)


def choose_level(measurement: Measurement, levels: Sequence[VocabularyLevel], unrepaired: float) -> int:
    """Returns the number of the vocabulary that loses least with the best units beside it.

    `unrepaired` is the part of the units' loss that remains after a repair.
    """
    limit = measurement.scope.limit
    losses = [level.loss + unrepaired * level.bits * units_loss(measurement, limit + level.saved) for level in levels]
    return losses.index(min(losses))


def units_loss(measurement: Measurement, limit: int) -> float:
    """Returns the estimated KL divergence of the best units within a limit, in nats.

    It is infinite if the limit is out of reach.
    """
    point = best_point(measurement.spaces, limit)
    return math.inf if point is None else measurement.spaces[point[0]].predicted(point[1])


def choose(
    measurement: Measurement, search: Search, seed: int, limit: int
) -> tuple[list[dict[str, int]], list[Candidate], list[Candidate]]:
    """Returns the finalists, candidates of other sizes, and all measured candidates.

    With uniform modules there may be several finalists, the best first; repair can change their ranking.
    """
    scope, losses, spaces, progress = measurement.scope, measurement.losses, measurement.spaces, measurement.progress
    progress.enter("searching")
    start = initial_points(spaces, limit, sorted(scope.blocks.removable, key=lambda block: losses[block.name][-1]))
    if scope.uniform:
        for _, levels in single_kind_levels(measurement, limit).values():
            start.append((0, levels))
    else:
        start += uniform_points(spaces[0], scope.modules, losses, limit - scope.now)

    def lost(point: Point) -> float:
        return measurement.lost(spaces[point[0]].kept(point[1]))

    move = partial(neighbor, spaces, limit)
    measured = evolve(start, move, lost, search.generations, search.candidates, seed)
    measured = dict(sorted(measured.items(), key=lambda item: item[1]))
    kept = [_filled(measurement, point, limit) for point in _finalists(measurement, measured)]
    progress.steps = progress.done + CURVE
    curve = {point: lost(point) for point in evenly_sized(spaces, CURVE)}
    return kept, _candidates(measurement, curve), _candidates(measurement, measured)


def _finalists(measurement: Measurement, measured: Mapping[Point, float]) -> list[Point]:
    """Returns the points to repair, whose blocks can be removed.

    Measured points are sorted by loss. Raises a ValueError if there are none.
    """
    scope, spaces, order = measurement.scope, measurement.spaces, list(measured)
    first = next((number for number, point in enumerate(order) if not _refusal(measurement, point)), None)
    if first is None:
        raise ValueError(_refusal(measurement, order[-1]))
    if not scope.uniform or measurement.pooling is not None:
        return [order[first]]

    def kinds_cut(point: Point) -> frozenset[str]:
        kept = spaces[point[0]].kept(point[1])
        blocks = {"block"} if spaces[point[0]].removed else set()
        return frozenset(blocks | {module.kind for module in scope.modules if 0 < kept[module.name] < module.count})

    return [point for point in finalists(order[first:], measured, kinds_cut) if not _refusal(measurement, point)]


def knapsack_solution(measurement: Measurement, limit: int) -> dict[str, int]:
    """Returns the kept units with the lowest estimated loss, or of the smallest model."""
    point = best_point(measurement.spaces, limit) or best_point(measurement.spaces, measurement.scope.least)
    assert point is not None
    return _filled(measurement, point, limit)


def _refusal(measurement: Measurement, point: Point) -> str:
    """Returns why the blocks of a point cannot be removed together; empty if they can."""
    blocks = measurement.scope.blocks
    removed = blocks.removed(measurement.spaces[point[0]].kept(point[1]))
    return blocks.refusal(removed) if removed else ""


def _filled(measurement: Measurement, point: Point, limit: int) -> dict[str, int]:
    """Adds units to modules, also between levels, up to the limit.

    Removed blocks stay removed.
    """
    scope, space, levels = measurement.scope, measurement.spaces[point[0]], point[1]
    kept, spare = space.kept(levels), limit - space.left(levels)
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
    for (number, levels), lost in losses.items():
        space = measurement.spaces[number]
        kept = space.kept(levels)
        by_module = {name: stay for name, (_, stay) in unit_counts(measurement.scope.modules, kept).items()}
        candidates.append(Candidate(kept | by_module, space.left(levels), space.predicted(levels), lost))
    return candidates


def smallest(measurement: Measurement, most: float, held_out: Sequence[Any], within: Within) -> SearchResult:
    """Finds the smallest size at which the repaired model meets a perplexity ratio.

    Bisection on assembled variants finds the size to start from. From there, smaller sizes are searched and repaired while they
    are good enough, or else larger ones until one is.

    Args:
        measurement: Losses of the variants.
        most: Largest allowed perplexity relative to the dense model.
        held_out: Batches for measuring, as dictionaries; their loss is the model's own.
        within: Searches within a limit.

    Raises:
        ValueError: If not even the largest size is good enough.
    """
    scope = measurement.scope
    model, sizes = scope.model, sorted({*np.linspace(scope.least, scope.now, SIZES + 1)[:-1].astype(int).tolist()})
    perplexity = Perplexity(model, [make_run(model, {}, batch) for batch in held_out], measurement.divergence.broadcast)

    def good(number: int) -> SearchResult | None:
        chosen = within(sizes[number])
        with simulated(model, chosen.planned):
            ratio = perplexity.ratio()
        return replace(chosen, ratio=ratio) if ratio <= most else None

    number = first_within_loss(measurement, sizes, most, perplexity)
    best = good(number)
    while best is not None and number > 0 and (smaller := good(number - 1)) is not None:
        best, number = smaller, number - 1
    while best is None and number < len(sizes) - 1:
        best, number = good(number + 1), number + 1
    if best is None:
        raise ValueError(
            f"max_loss={most} is out of reach: a model of {sizes[-1]:,} parameters already exceeds it. Raise max_loss."
        )
    return best


def first_within_loss(measurement: Measurement, sizes: Sequence[int], most: float, perplexity: Perplexity) -> int:
    """Returns the index of the smallest size at which assembled variants meet the ratio."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        point, ratio = best_point(measurement.spaces, sizes[middle]), math.inf
        if point is not None:
            with measurement.cache.assembled(measurement.spaces[point[0]].kept(point[1])):
                ratio = perplexity.ratio()
        low, high = (low, middle) if ratio <= most else (middle + 1, high)
    return low
