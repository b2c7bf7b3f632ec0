"""The spaces of a search: slots whose levels are chosen, beside what is the same at all levels, as blocks that are gone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

import numpy as np

from billhook.pruning.amount import round_units
from billhook.shrinking.blocks import Block
from billhook.shrinking.knapsack import (
    Frontier,
    Joint,
    Levels,
    Slot,
    best_of,
    cost,
    joined,
    kept_at,
    loss,
    mutated,
    product_of,
    widest,
)
from billhook.shrinking.layers import Layer, alike_layers

SEVERAL = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""How many blocks are gone in the choices that a search begins with: sums say too little of what several lose together."""
Losses = Mapping[str, Sequence[float]]
"""By layer, what is lost at each of its configs; by block, the last is what is lost without it."""
Point = tuple[int, Levels]
"""A choice: the number of a space, and levels of its slots."""


@dataclass(eq=False)
class Space:
    """Slots whose levels are chosen.

    Attributes:
        slots: The slots.
        rest: What all else costs.
        removed: Blocks that are gone at all levels.
        lost: What is lost without them.
    """

    slots: Sequence[Slot | Joint]
    rest: int
    removed: Sequence[Block] = ()
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
        """Returns how many units each layer keeps; 0 of blocks that are gone, and of all in them."""
        nothing = {name: 0 for block in self.removed for name in (block.name, *block.layers)}
        return nothing | kept_at(self.slots, levels)

    def best(self, limit: int) -> Levels | None:
        """Returns the levels that are to lose least within a limit."""
        return self.frontier.within(limit - self.rest)

    def best_without(self, limit: int, blocks: Collection[str]) -> Levels | None:
        """Returns the levels that are to lose least within a limit if just these blocks go."""
        removed = frozenset(blocks)
        if removed not in self._frontiers:
            self._frontiers[removed] = Frontier([_decided(slot, removed) for slot in self.slots])
        levels = self._frontiers[removed].within(limit - self.rest)
        if levels is None:
            return None
        last = [len(slot.costs) - 1 if _goes(slot, removed) else 0 for slot in self.slots]
        return tuple(first + level for first, level in zip(last, levels, strict=True))

    def nearest(self, saved: Mapping[str, int]) -> Levels:
        """Returns the levels that lose least where each slot costs as little as if its layers saved so much."""
        levels = list[int]()
        for slot in self.slots:
            most = slot.costs[0] - sum(saved[name] for name in slot.at(0))
            levels.append(next(level for level, price in enumerate(slot.costs) if price <= most))
        return tuple(levels)


def _goes(slot: Slot | Joint, blocks: Collection[str]) -> bool:
    """Tells whether a slot is that of one of these blocks."""
    return any(slot.at(-1).get(name) == 0 for name in blocks)


def _decided(slot: Slot | Joint, removed: Collection[str]) -> Slot | Joint:
    """Returns the slot of a block that goes as one without choice, and that of any other without the choice to go."""
    if isinstance(slot, Slot) or 0 not in slot.at(-1).values():
        return slot
    levels = slice(-1, None) if _goes(slot, removed) else slice(0, -1)
    return Joint(slot.kept[levels], slot.costs[levels], slot.losses[levels])


def make_slots(layers: Sequence[Layer], losses: Losses, uniform: bool) -> list[Slot]:
    """Makes a slot of each layer, or of all layers of one kind and size."""

    def slot(layer: Layer) -> Slot:
        return Slot((layer.name,), layer.configs, tuple(map(layer.cost, layer.configs)), tuple(losses[layer.name]))

    return [joined(list(map(slot, group))) for group in alike_layers(layers, uniform)]


def all_kept(slots: Sequence[Slot | Joint]) -> int:
    """Returns what slots cost where all is kept."""
    return cost(slots, (0,) * len(slots))


def outside(layers: Sequence[Layer], blocks: Sequence[Block]) -> list[Layer]:
    """Returns the layers that are in none of some blocks."""
    inside = {name for block in blocks for name in block.layers}
    return [layer for layer in layers if layer.name not in inside]


def free_space(layers: Sequence[Layer], losses: Losses, blocks: Sequence[Block], now: int) -> list[Space]:
    """Makes the space in which each block keeps its own numbers of units, or goes, and so does each layer outside of those."""
    slots: list[Slot | Joint] = list(make_slots(outside(layers, blocks), losses, uniform=False))
    for block in blocks:
        inside = make_slots([layer for layer in layers if layer.name in block.layers], losses, uniform=False)
        slots.append(with_removal(inside, block, losses[block.name][-1]))
    return [Space(slots, now - all_kept(slots))]


def with_removal(slots: Sequence[Slot], block: Block, lost: float) -> Joint:
    """Combines the slots of a block's layers, and the choice that all of it goes."""
    stays = product_of(slots, block.cost - all_kept(slots))
    nothing = dict.fromkeys((*block.layers, block.name), 0)
    return best_of([*zip(stays.costs, stays.losses, stays.kept, strict=True), (0, lost, nothing)])


def uniform_spaces(layers: Sequence[Layer], losses: Losses, blocks: Sequence[Block], now: int) -> list[Space]:
    """Makes a space for each number of blocks that go, those that matter least, in which all others stay alike."""
    ranked, spaces = sorted(blocks, key=lambda block: losses[block.name][-1]), list[Space]()
    for count in range(len(ranked) + 1):
        removed = ranked[:count]
        slots = make_slots(outside(layers, removed), losses, uniform=True)
        rest = now - sum(block.cost for block in removed) - all_kept(slots)
        spaces.append(Space(slots, rest, removed, sum(losses[block.name][-1] for block in removed)))
    return spaces


def starts(spaces: Sequence[Space], limit: int, ranked: Sequence[Block]) -> list[Point]:
    """Returns choices within a limit to begin with: the best of all, and the best for several numbers of blocks that go.

    Args:
        spaces: The spaces.
        limit: The most that may be left.
        ranked: The blocks that may go, those that matter least first.
    """
    best = [(number, space.best(limit)) for number, space in enumerate(spaces) if len(space.removed) in SEVERAL]
    if len(spaces) == 1 and ranked:
        names = [block.name for block in ranked]
        best += [(0, spaces[0].best_without(limit, names[:count])) for count in SEVERAL if count <= len(names)]
    points = [(number, levels) for number, levels in best if levels is not None]
    return points or [point for point in [best_point(spaces, limit)] if point is not None]


def as_uniform(space: Space, layers: Sequence[Layer], losses: Losses, more: int) -> list[Point]:
    """Returns the best choice in which layers of a kind keep as many, as levels of a free space; none if there is none.

    Args:
        space: The free space.
        layers: The layers.
        losses: What is lost at each of their configs.
        more: How much more than now may be left, as a rule less than zero.
    """
    slots = make_slots(layers, losses, uniform=True)
    levels = Frontier(slots).within(more + all_kept(slots))
    if levels is None:
        return []
    kept = kept_at(slots, levels)
    return [(0, space.nearest({layer.name: layer.saves(kept[layer.name]) for layer in layers}))]


def best_point(spaces: Sequence[Space], limit: int) -> Point | None:
    """Returns the choice within a limit that is to lose least; None if none is so small."""
    points = [(number, levels) for number, space in enumerate(spaces) if (levels := space.best(limit)) is not None]
    return min(points, key=lambda point: spaces[point[0]].predicted(point[1]), default=None)


def spread(spaces: Sequence[Space], most: int) -> list[Point]:
    """Returns the best choices of so many evenly spaced sizes, at most, from the smallest to what keeps all."""
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
"""For how many blocks that go there are configs that just meet the budget, where layers stay alike."""


def costs_of(layers: Sequence[Layer], uniform: bool) -> list[dict[int, int]]:
    """Returns by slot, and by all numbers of units that its layers may keep, what they cost."""
    groups = alike_layers(layers, uniform)
    return [{kept: sum(layer.cost(kept) for layer in group) for kept in group[0].allowed} for group in groups]


def just_met(layers: Sequence[Layer], blocks: Sequence[Block], now: int, limit: int) -> dict[str, set[int]]:
    """Finds further numbers to keep, where layers of a kind keep as many, that just meet a limit.

    That is for several numbers of blocks that go, as if all were alike.
    """
    met: dict[str, set[int]] = {}
    for count in (number for number in BLOCKS if number <= len(blocks)):
        left = outside(layers, blocks[:count])
        groups = alike_layers(left, uniform=True)
        within = limit - now + sum(block.cost for block in blocks[:count]) + sum(layer.cost(layer.count) for layer in left)
        more = widest([group[0].configs for group in groups], costs_of(left, uniform=True), within) if groups else {}
        for number, kept in more.items():
            same = next(group for group in alike_layers(layers, uniform=True) if groups[number][0] in group)
            for layer in same:
                met.setdefault(layer.name, set()).update(kept)
    return met


def coarser(layers: Sequence[Layer], kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
    """Lets channels be a larger multiple of what rows are best a multiple of, where that takes at most 3 % of them more.

    Of them counts what a budget leaves, be it between the numbers that may be kept.

    Args:
        layers: The layers, which stay alike.
        kept: How many units some of them keep.
        spare: How much less they leave than the budget does.
    """
    numbers = dict(kept)
    for group in alike_layers(layers, uniform=True):
        present, layer = [layer.name for layer in group if kept.get(layer.name, 0)], group[0]
        now = kept[present[0]] if present else layer.count
        if layer.kind == "channel" and now < layer.count:
            fewer = round_units(_afforded(layer, now, spare / len(present)), layer.count, maximum=now, allow_more=False)
            numbers |= dict.fromkeys(present, fewer if fewer in layer.allowed else now)
    return numbers


def _afforded(layer: Layer, kept: int, spare: float) -> int:
    """Returns how many units a layer could keep, allowed or not, if it were given all that is spare."""
    within = layer.cost(kept) + spare
    return next((more - 1 for more in range(kept + 1, layer.count) if layer.cost(more) > within), layer.count - 1)


NEAR = 1.25
"""How many times as much as the best a choice may lose before repair: refitted layers put together say too little of it."""
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
