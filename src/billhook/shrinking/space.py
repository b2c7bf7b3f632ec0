"""The spaces of a search: slots whose levels are chosen, beside what is the same at all levels, as blocks that are gone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

import numpy as np

from billhook.pruning.amount import rounded
from billhook.shrinking.blocks import Block
from billhook.shrinking.choose import (
    Frontier,
    Joint,
    Levels,
    Slot,
    best_of,
    cost,
    filled,
    kept_at,
    loss,
    mutated,
    product_of,
    widest,
)
from billhook.shrinking.damages import groups, make_slots
from billhook.shrinking.levels import Place

SEVERAL = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""How many blocks are gone in the choices that a search begins with: sums say too little of what several lose together."""
Point = tuple[int, Levels]
"""A choice: the number of a space, and levels of its slots."""


@dataclass(eq=False)
class Space:
    """Slots whose levels are chosen.

    Attributes:
        slots: The slots.
        rest: What all else costs.
        gone: Blocks that are gone at all levels.
        lost: What is lost without them.
    """

    slots: Sequence[Slot | Joint]
    rest: int
    gone: Sequence[Block] = ()
    lost: float = 0.0
    _frontiers: dict[frozenset[str], Frontier] = field(default_factory=dict)

    @cached_property
    def frontier(self) -> Frontier:
        """The choices that no other beats."""
        return Frontier(self.slots)

    def left(self, levels: Levels) -> int:
        """Returns what is left of what the budget limits."""
        return self.rest + cost(self.slots, levels)

    def predicted(self, levels: Levels) -> float:
        """Returns the sum of what is lost."""
        return self.lost + loss(self.slots, levels)

    def kept(self, levels: Levels) -> dict[str, int]:
        """Returns how many units each place keeps; 0 of blocks that are gone, and of all in them."""
        gone = {name: 0 for block in self.gone for name in (block.name, *block.places)}
        return gone | kept_at(self.slots, levels)

    def best(self, limit: int) -> Levels | None:
        """Returns the levels that are to lose least within a limit."""
        return self.frontier.within(limit - self.rest)

    def best_without(self, limit: int, names: Collection[str]) -> Levels | None:
        """Returns the levels that are to lose least within a limit if just these blocks go."""
        gone = frozenset(names)
        if gone not in self._frontiers:
            self._frontiers[gone] = Frontier([_only(slot, gone) for slot in self.slots])
        levels = self._frontiers[gone].within(limit - self.rest)
        if levels is None:
            return None
        last = [len(slot.costs) - 1 if _goes(slot, gone) else 0 for slot in self.slots]
        return tuple(first + level for first, level in zip(last, levels, strict=True))

    def nearest(self, saved: Mapping[str, int]) -> Levels:
        """Returns the levels that lose least where each slot costs as little as if its places saved so much."""
        found = list[int]()
        for slot in self.slots:
            most = slot.costs[0] - sum(saved[name] for name in slot.at(0))
            found.append(next(level for level, own in enumerate(slot.costs) if own <= most))
        return tuple(found)


def _goes(slot: Slot | Joint, names: Collection[str]) -> bool:
    """Tells whether a slot is that of one of these blocks."""
    return any(slot.at(-1).get(name) == 0 for name in names)


def _only(slot: Slot | Joint, gone: Collection[str]) -> Slot | Joint:
    """Returns the slot of a block that goes as one without choice, and that of any other without the choice to go."""
    if isinstance(slot, Slot) or 0 not in slot.at(-1).values():
        return slot
    own = slice(-1, None) if _goes(slot, gone) else slice(0, -1)
    return Joint(slot.kept[own], slot.costs[own], slot.losses[own])


def free_space(
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    blocks: Sequence[Block],
    now: int,
) -> list[Space]:
    """Makes the space in which each block keeps its own numbers of units, or goes, and so does each place outside of those."""
    inside = {name for block in blocks for name in block.places}
    slots: list[Slot | Joint] = list(make_slots([p for p in places if p.name not in inside], levels, losses, uniform=False))
    for block in blocks:
        own = make_slots([place for place in places if place.name in block.places], levels, losses, uniform=False)
        slots.append(with_gone(own, block, losses[block.name][-1]))
    return [Space(slots, now - cost(slots, (0,) * len(slots)))]


def with_gone(slots: Sequence[Slot], block: Block, lost: float) -> Joint:
    """Combines the slots of a block's places, and the choice that all of it goes."""
    own = product_of(slots, block.cost - cost(slots, (0,) * len(slots)))
    nothing = dict.fromkeys((*block.places, block.name), 0)
    return best_of([*zip(own.costs, own.losses, own.kept, strict=True), (0, lost, nothing)])


def uniform_spaces(
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    blocks: Sequence[Block],
    now: int,
) -> list[Space]:
    """Makes a space for each number of blocks that go, those that matter least, in which all others stay alike."""
    ranked, found = sorted(blocks, key=lambda block: losses[block.name][-1]), list[Space]()
    for count in range(len(ranked) + 1):
        gone = ranked[:count]
        inside = {name for block in gone for name in block.places}
        slots = make_slots([place for place in places if place.name not in inside], levels, losses, uniform=True)
        rest = now - sum(block.cost for block in gone) - cost(slots, (0,) * len(slots))
        found.append(Space(slots, rest, gone, sum(losses[block.name][-1] for block in gone)))
    return found


def starts(spaces: Sequence[Space], limit: int, ranked: Sequence[Block]) -> list[Point]:
    """Returns choices within a limit to begin with: the best of all, and the best for several numbers of blocks that go.

    Args:
        spaces: The spaces.
        limit: The most that may be left.
        ranked: The blocks that may go, those that matter least first.
    """
    found = [(number, space.best(limit)) for number, space in enumerate(spaces) if len(space.gone) in SEVERAL]
    if len(spaces) == 1:
        several = [ranked[:count] for count in SEVERAL if count <= len(ranked)] if ranked else []
        found += [(0, spaces[0].best_without(limit, [block.name for block in gone])) for gone in several]
    points = [(number, levels) for number, levels in found if levels is not None]
    return points or [point for point in [best_point(spaces, limit)] if point is not None]


def as_uniform(
    space: Space,
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    more: int,
) -> list[Point]:
    """Returns the best choice in which places of a kind keep as many, as levels of a free space; none if there is none.

    Args:
        space: The free space.
        places: The places.
        levels: By place, how many units it keeps at each level.
        losses: By place, what is lost at each.
        more: How much more than now may be left, as a rule less than zero.
    """
    shared = make_slots(places, levels, losses, uniform=True)
    found = Frontier(shared).within(more + cost(shared, (0,) * len(shared)))
    if found is None:
        return []
    kept = kept_at(shared, found)
    return [(0, space.nearest({place.name: place.saves(kept[place.name]) for place in places}))]


def best_point(spaces: Sequence[Space], limit: int) -> Point | None:
    """Returns the choice within a limit that is to lose least; None if none is so small."""
    found = [(number, levels) for number, space in enumerate(spaces) if (levels := space.best(limit)) is not None]
    return min(found, key=lambda point: spaces[point[0]].predicted(point[1]), default=None)


def spread(spaces: Sequence[Space], most: int) -> list[Point]:
    """Returns the best choices of so many evenly spaced sizes, at most, from the smallest to the whole."""
    sizes = [space.rest + int(size) for space in spaces for size in space.frontier.costs[[0, -1]]]
    wanted = (best_point(spaces, int(size)) for size in np.linspace(min(sizes), max(sizes), most))
    points = dict.fromkeys(point for point in wanted if point is not None)
    return sorted(points, key=lambda point: spaces[point[0]].left(point[1]))


def moved(spaces: Sequence[Space], limit: int, point: Point, random: Random) -> Point | None:
    """Moves levels of a choice up and down within a limit, at times with a block more or less gone; None if that cannot be."""
    number, levels = point
    if len(spaces) > 1 and random.random() < 1 / 3:
        number += random.choice((-1, 1))
        best = spaces[number].best(limit) if 0 <= number < len(spaces) else None
        return None if best is None else (number, best)
    space = spaces[number]
    new = mutated(space.slots, levels, limit - space.rest, random)
    return None if new is None else (number, new)


BLOCKS = (0, 1, 2, 4)
"""For how many blocks that go there are levels that just meet the budget, where layers stay alike."""


def costs_of(places: Sequence[Place], uniform: bool) -> list[dict[int, int]]:
    """Returns by slot, and by all numbers of units that its places may keep, what they cost."""
    own = groups(places, uniform)
    return [{kept: sum(place.cost(kept) for place in group) for kept in group[0].allowed} for group in own]


def just_met(
    places: Sequence[Place], blocks: Sequence[Block], now: int, levels: Mapping[str, Sequence[int]], limit: int
) -> dict[str, set[int]]:
    """Finds further numbers to keep, where places of a kind keep as many, that just meet a limit.

    That is for several numbers of blocks that go, as if all were alike.
    """
    found: dict[str, set[int]] = {}
    for count in (one for one in BLOCKS if one <= len(blocks)):
        gone = blocks[:count]
        inside = {name for block in gone for name in block.places}
        left = [place for place in places if place.name not in inside]
        own, whole = groups(left, uniform=True), sum(place.cost(place.count) for place in left)
        within = limit - now + sum(block.cost for block in gone) + whole
        more = widest([levels[group[0].name] for group in own], costs_of(left, uniform=True), within) if own else {}
        for number, kept in more.items():
            alike = next(group for group in groups(places, uniform=True) if own[number][0] in group)
            for place in alike:
                found.setdefault(place.name, set()).update(kept)
    return found


def filled_up(
    space: Space,
    chosen: Levels,
    limit: int,
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    uniform: bool,
) -> dict[str, int]:
    """Lets places keep more, between levels too, as far as a limit goes; what goes with its block stays gone."""
    kept, spare = space.kept(chosen), limit - space.left(chosen)
    present = [place for place in places if kept[place.name]]
    slots = make_slots(present, levels, losses, uniform)
    own = tuple(slot.kept.index(kept[slot.names[0]]) for slot in slots)
    some = zip(groups(present, uniform), slots, costs_of(present, uniform), strict=True)
    costs = [{one: c for one, c in own.items() if not group[0].pairs or one in slot.kept} for group, slot, own in some]
    more = filled(slots, own, cost(slots, own) + max(spare, 0), costs)
    return kept | {name: number for slot, number in zip(slots, more, strict=True) for name in slot.names}


def coarser(places: Sequence[Place], kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
    """Lets channels be a larger multiple of what rows are best a multiple of, where that takes at most 3 % of them more.

    Of them counts what a budget leaves, be it between the numbers that may be kept.

    Args:
        places: The places, which stay alike.
        kept: How many units some of them keep.
        spare: How much less they leave than the budget does.
    """
    found = dict(kept)
    for group in groups(places, uniform=True):
        present, place = [one.name for one in group if kept.get(one.name, 0)], group[0]
        now = kept[present[0]] if present else place.count
        if place.kind == "channel" and now < place.count:
            fewer = rounded(_afforded(place, now, spare / len(present)), place.count, most=now, more=False)
            found |= dict.fromkeys(present, fewer if fewer in place.allowed else now)
    return found


def _afforded(place: Place, kept: int, spare: float) -> int:
    """Returns how many units a place could keep, allowed or not, if it were given all that is spare."""
    within = place.cost(kept) + spare
    return next((more - 1 for more in range(kept + 1, place.count) if place.cost(more) > within), place.count - 1)


NEAR = 1.25
"""How many times as much as the best a choice may lose before repair: refitted places put together say too little of it."""
MOST = 2
"""How many choices are repaired at most."""


def finalists(order: Sequence[Point], measured: Mapping[Point, float], cut: Callable[[Point], frozenset[str]]) -> list[Point]:
    """Returns the choice that loses least, and after it the best of others that cut other kinds of units and lose little more.

    Args:
        order: Choices, the one that loses least first.
        measured: What each of them loses.
        cut: The kinds of units of which a choice keeps less.

    >>> finalists([(0, (1, 1)), (0, (1, 0)), (0, (0, 1))], {(0, (1, 1)): 1.0, (0, (1, 0)): 1.1, (0, (0, 1)): 1.5},
    ...     lambda point: frozenset(kind for kind, level in zip(("channel", "head"), point[1]) if level))
    [(0, (1, 1)), (0, (1, 0))]
    """
    best: dict[frozenset[str], Point] = {}
    for point in order:
        best.setdefault(cut(point), point)
    first, *others = best.values()
    return [first, *(point for point in others if measured[point] <= NEAR * measured[first])][:MOST]


def kinds_cut(space: Space, levels: Levels, places: Sequence[Place]) -> frozenset[str]:
    """Returns the kinds of units of which a choice keeps less: of places, and `"block"`."""
    kept = space.kept(levels)
    kinds = {place.kind for place in places if 0 < kept[place.name] < place.count}
    return frozenset({*kinds, *(["block"] if space.gone else [])})
