"""The third stage of a search: the candidates that lose least within a limit, planned, and repaired as a whole."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from billhook.importance.score import make_run
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.candidates import CURVE
from billhook.shrinking.divergence import Perplexity
from billhook.shrinking.knapsack import cost, evolve, filled
from billhook.shrinking.layers import counts
from billhook.shrinking.measurement import Measured, of_one_kind
from billhook.shrinking.planned import Planned, as_planned, plan
from billhook.shrinking.search import Search
from billhook.shrinking.shrunk import Choice, Times
from billhook.shrinking.space import Point, as_uniform, best_point, costs_of, finalists, make_slots, moved, spread, starts

SIZES = 64
"""Into how many steps what may be removed is divided."""


@dataclass(frozen=True)
class Chosen:
    """The plan that a search chose within a limit, and its measured loss.

    Attributes:
        kept: By layer, how many units it keeps.
        planned: The plans, with repaired weights.
        limit: The limit.
        curve: Choices of other sizes.
        tried: What was measured within the limit.
        ratio: Perplexity to the dense model's, where a budget of it was given.
        times: How long the model takes, where a budget of time was given.
        alone: By the name of a kind of unit, what is left of the target, and lost, without units of this kind alone.
    """

    kept: dict[str, int]
    planned: Planned
    limit: int
    curve: list[Choice]
    tried: list[Choice]
    ratio: float | None = None
    times: Times | None = None
    alone: dict[str, tuple[int, float]] = field(default_factory=dict)


Within = Callable[[int], Chosen]
"""Searches within a limit."""


def choose_within(
    measured: Measured, fitted: Sequence[Any], repair: RepairConfig | None, search: Search, seed: int, limit: int
) -> Chosen:
    """Searches within a limit, and repairs what is chosen as a whole; of several choices, takes what then loses least."""
    choices, curve, tried = choose(measured, search, seed, limit)
    if repair is None:
        choices = choices[:1]
    chosen = [Chosen(kept, plan(measured, limit, kept, fitted, repair), limit, curve, tried) for kept in choices]
    if len(chosen) == 1:
        return chosen[0]
    losses = list[float]()
    for one in chosen:
        with as_planned(measured.candidates.model, one.planned):
            losses.append(measured.divergence.mean())
    return chosen[losses.index(min(losses))]


def choose(measured: Measured, search: Search, seed: int, limit: int) -> tuple[list[dict[str, int]], list[Choice], list[Choice]]:
    """Returns how many units layers keep, the choices of other sizes, and what has been measured within the limit.

    Where layers stay alike there may be several choices, the best first, of which repair is to tell which one it is.
    """
    candidates, losses, spaces, progress = measured.candidates, measured.losses, measured.spaces, measured.progress
    progress.enter("searching")
    start = starts(spaces, limit, sorted(candidates.blocks.able, key=lambda block: losses[block.name][-1]))
    if candidates.uniform:
        start += [(0, levels) for _, levels in of_one_kind(measured, limit).values()]
    else:
        start += as_uniform(spaces[0], candidates.layers, losses, limit - candidates.now)

    def lost(point: Point) -> float:
        return measured.lost(spaces[point[0]].kept(point[1]))

    def kinds_cut(point: Point) -> frozenset[str]:
        kept = spaces[point[0]].kept(point[1])
        blocks = {"block"} if spaces[point[0]].removed else set()
        return frozenset(blocks | {layer.kind for layer in candidates.layers if 0 < kept[layer.name] < layer.count})

    move = partial(moved, spaces, limit)
    found = evolve(start, move, lost, search.generations, search.candidates, seed)
    order = sorted(found, key=lambda point: found[point])
    first = next((number for number, point in enumerate(order) if not _refusal(measured, point)), None)
    if first is None:
        raise ValueError(_refusal(measured, order[-1]))
    best = [order[first]]
    if candidates.uniform and measured.merging is None:
        several = finalists(order[first:], found, kinds_cut)
        best = [point for point in several if not _refusal(measured, point)]
    kept = [_filled(measured, point, limit) for point in best]
    progress.steps = progress.done + CURVE
    curve = [_choice(measured, point, lost(point)) for point in spread(spaces, CURVE)]
    return kept, curve, [_choice(measured, point, found[point]) for point in order]


def choose_by_sums(measured: Measured, limit: int) -> dict[str, int]:
    """Returns how many units layers keep by what they lose alone, added up; as few as may be where none fits."""
    point = best_point(measured.spaces, limit) or best_point(measured.spaces, measured.candidates.least)
    assert point is not None
    return _filled(measured, point, limit)


def _refusal(measured: Measured, point: Point) -> str:
    """Says why the blocks of a choice cannot go together; empty if they can, or none goes."""
    blocks = measured.candidates.blocks
    removed = blocks.removed(measured.spaces[point[0]].kept(point[1]))
    return blocks.refusal(removed) if removed else ""


def _filled(measured: Measured, point: Point, limit: int) -> dict[str, int]:
    """Lets layers keep more, between configs too, as far as a limit goes; what goes with its block stays gone."""
    candidates, space, levels = measured.candidates, measured.spaces[point[0]], point[1]
    kept, spare = space.kept(levels), limit - space.left(levels)
    present = [layer for layer in candidates.layers if kept[layer.name]]
    slots = make_slots(present, measured.losses, candidates.uniform)
    chosen = tuple(slot.kept.index(kept[slot.names[0]]) for slot in slots)
    numbers = filled(slots, chosen, cost(slots, chosen) + max(spare, 0), costs_of(present, candidates.uniform))
    more = kept | {name: number for slot, number in zip(slots, numbers, strict=True) for name in slot.names}
    spare -= sum(layer.cost(more[layer.name]) - layer.cost(kept[layer.name]) for layer in present)
    return candidates.rounded(more, spare)


def _choice(measured: Measured, point: Point, lost: float) -> Choice:
    space, levels = measured.spaces[point[0]], point[1]
    kept = space.kept(levels)
    by_module = {name: stay for name, (_, stay) in counts(measured.candidates.layers, kept).items()}
    return Choice(kept | by_module, space.left(levels), space.predicted(levels), lost)


def smallest(measured: Measured, most: float, held_out: Sequence[Any], within: Within) -> Chosen:
    """Finds the smallest size at which the model, repaired as a whole, has at most so many times its perplexity.

    Bisection on what the refitted layers lose when they are put together says where to begin. From there sizes are searched and
    repaired one after the other: smaller ones as long as they are good enough, or else larger ones until one is.

    Args:
        measured: What candidates lose.
        most: How many times the dense model's perplexity may be.
        held_out: Batches that it is measured on, as dictionaries; their losses are the model's own.
        within: Searches within a limit.

    Raises:
        ValueError: If not even the largest size is good enough.
    """
    candidates = measured.candidates
    model, sizes = candidates.model, sorted({*np.linspace(candidates.least, candidates.now, SIZES + 1)[:-1].astype(int).tolist()})
    perplexity = Perplexity(model, [make_run(model, {}, batch) for batch in held_out], measured.divergence.agreed)

    def good(number: int) -> Chosen | None:
        chosen = within(sizes[number])
        with as_planned(model, chosen.planned):
            ratio = perplexity.ratio()
        return replace(chosen, ratio=ratio) if ratio <= most else None

    number = first_met(measured, sizes, most, perplexity)
    best = good(number)
    while best is not None and number > 0 and (smaller := good(number - 1)) is not None:
        best, number = smaller, number - 1
    while best is None and number < len(sizes) - 1:
        best, number = good(number + 1), number + 1
    if best is None:
        raise ValueError(f"max_loss={most}: not even a model of {sizes[-1]:,} parameters meets it")
    return best


def first_met(measured: Measured, sizes: Sequence[int], most: float, perplexity: Perplexity) -> int:
    """Returns the number of the smallest size that is good enough when refitted layers are put together; or that of the last."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        point, ratio = best_point(measured.spaces, sizes[middle]), math.inf
        if point is not None:
            with measured.cache.assembled(measured.spaces[point[0]].kept(point[1])):
                ratio = perplexity.ratio()
        low, high = (low, middle) if ratio <= most else (middle + 1, high)
    return low
