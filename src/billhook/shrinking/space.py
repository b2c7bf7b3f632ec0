"""Search spaces: slots with levels to choose, for a fixed set of removed blocks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from random import Random

import numpy as np

from billhook.pruning.amount import round_units
from billhook.shrinking.blocks import Block
from billhook.shrinking.knapsack import (
    Frontier,
    JointSlot,
    Levels,
    Slot,
    Slots,
    cost,
    join_slots,
    kept_at,
    loss,
    mutate,
    pareto_slot,
    sizes_at_limit,
)
from billhook.shrinking.modules import PrunableModule, PrunableModules, uniform_groups

SEVERAL = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of removed blocks to start from: estimated losses of single blocks do not predict their joint loss."""
Losses = Mapping[str, Sequence[float]]
"""Losses by module and level; for blocks, the last entry is the loss without the block."""
Point = tuple[int, Levels]
"""A point of the search: index of a space, and the levels of its slots."""


@dataclass(eq=False)
class Space:
    """Slots whose levels are chosen.

    Attributes:
        slots: The slots.
        rest: Cost of everything outside the slots.
        removed: Blocks that are removed at all levels.
        lost: Estimated loss of removing these blocks.
    """

    slots: Slots
    rest: int
    removed: Sequence[Block] = ()
    lost: float = 0.0
    _frontiers: dict[frozenset[str], Frontier] = field(default_factory=dict)

    @cached_property
    def frontier(self) -> Frontier:
        """The Pareto-optimal choices."""
        return Frontier(self.slots)

    def left(self, levels: Levels) -> int:
        """Returns the cost of the model at a choice of levels."""
        return self.rest + cost(self.slots, levels)

    def predicted(self, levels: Levels) -> float:
        """Returns the estimated loss, a sum over modules."""
        return self.lost + loss(self.slots, levels)

    def kept(self, levels: Levels) -> dict[str, int]:
        """Returns the number of kept units by module; 0 for removed blocks and the modules inside."""
        nothing = {name: 0 for block in self.removed for name in (block.name, *block.modules)}
        return nothing | kept_at(self.slots, levels)

    def best(self, limit: int) -> Levels | None:
        """Returns the levels with the lowest estimated loss within a limit."""
        return self.frontier.within(limit - self.rest)

    def best_without(self, limit: int, blocks: Collection[str]) -> Levels | None:
        """Returns the best levels within a limit if exactly these blocks are removed."""
        removed = frozenset(blocks)
        if removed not in self._frontiers:
            decided = []
            for slot in self.slots:
                if isinstance(slot, JointSlot) and 0 in slot.at(-1).values():  # with only its last level, or without it
                    levels_left = slice(-1, None) if _goes(slot, removed) else slice(0, -1)
                    slot = JointSlot(slot.kept[levels_left], slot.costs[levels_left], slot.losses[levels_left])
                decided.append(slot)
            self._frontiers[removed] = Frontier(decided)
        levels = self._frontiers[removed].within(limit - self.rest)
        if levels is None:
            return None
        chosen = []
        for slot, level in zip(self.slots, levels, strict=True):
            chosen.append(level + (len(slot.costs) - 1 if _goes(slot, removed) else 0))
        return tuple(chosen)

    def nearest(self, saved: Mapping[str, int]) -> Levels:
        """Returns the lowest-loss levels at which each slot saves at least the given cost."""
        levels = []
        for slot in self.slots:
            most = slot.costs[0] - sum(saved[name] for name in slot.at(0))
            levels.append(next(level for level, price in enumerate(slot.costs) if price <= most))
        return tuple(levels)


def _goes(slot: Slot | JointSlot, blocks: Collection[str]) -> bool:
    """Returns whether the block of a slot is removed."""
    return any(slot.at(-1).get(name) == 0 for name in blocks)


def make_slots(modules: PrunableModules, losses: Losses, uniform: bool) -> list[Slot]:
    """Returns a slot for each module, or for all modules of a kind and size."""

    def slot(module: PrunableModule) -> Slot:
        return Slot((module.name,), module.levels, tuple(map(module.cost, module.levels)), tuple(losses[module.name]))

    return [join_slots(list(map(slot, group))) for group in uniform_groups(modules, uniform)]


def full_cost(slots: Slots) -> int:
    """Returns the cost of slots with all units."""
    return cost(slots, (0,) * len(slots))


def modules_outside(modules: PrunableModules, blocks: Sequence[Block]) -> list[PrunableModule]:
    """Returns the modules outside some blocks."""
    inside = {name for block in blocks for name in block.modules}
    return [module for module in modules if module.name not in inside]


def free_space(modules: PrunableModules, losses: Losses, blocks: Sequence[Block], now: int) -> list[Space]:
    """Returns the space of non-uniform candidates."""
    slots: list[Slot | JointSlot] = list(make_slots(modules_outside(modules, blocks), losses, uniform=False))
    for block in blocks:
        inside = make_slots([module for module in modules if module.name in block.modules], losses, uniform=False)
        slots.append(with_removal(inside, block, losses[block.name][-1]))
    return [Space(slots, now - full_cost(slots))]


def with_removal(slots: Sequence[Slot], block: Block, lost: float) -> JointSlot:
    """Combines the slots of a block's modules and the option to remove the block."""
    rest, nothing = block.cost - full_cost(slots), dict.fromkeys((*block.modules, block.name), 0)
    every = product(*(range(len(slot.costs)) for slot in slots))
    options = [(rest + cost(slots, levels), loss(slots, levels), kept_at(slots, levels)) for levels in every]
    return pareto_slot([*options, (0, lost, nothing)])


def uniform_spaces(modules: PrunableModules, losses: Losses, blocks: Sequence[Block], now: int) -> list[Space]:
    """Returns a uniform space for each number of removed blocks, least important first."""
    ranked, spaces = sorted(blocks, key=lambda block: losses[block.name][-1]), []
    for count in range(len(ranked) + 1):
        removed = ranked[:count]
        slots = make_slots(modules_outside(modules, removed), losses, uniform=True)
        rest = now - sum(block.cost for block in removed) - full_cost(slots)
        spaces.append(Space(slots, rest, removed, sum(losses[block.name][-1] for block in removed)))
    return spaces


def initial_points(spaces: Sequence[Space], limit: int, ranked: Sequence[Block]) -> list[Point]:
    """Returns the points to start from, for several numbers of removed blocks.

    Args:
        spaces: The spaces.
        limit: Largest allowed cost.
        ranked: The removable blocks, the least important first.
    """
    best = [(number, space.best(limit)) for number, space in enumerate(spaces) if len(space.removed) in SEVERAL]
    if len(spaces) == 1 and ranked:
        names = [block.name for block in ranked]
        for count in SEVERAL:
            best += [(0, spaces[0].best_without(limit, names[:count]))] if count <= len(names) else []
    points = []
    for number, levels in best:
        if levels is not None:
            points.append((number, levels))
    if not points and (point := best_point(spaces, limit)) is not None:
        points.append(point)
    return points


def uniform_points(space: Space, modules: PrunableModules, losses: Losses, more: int) -> list[Point]:
    """Returns the best uniform choice as a point of a non-uniform space, or no point.

    Args:
        space: The non-uniform space.
        modules: The modules.
        losses: Losses by module and level.
        more: Allowed cost minus the current cost, usually negative.
    """
    slots = make_slots(modules, losses, uniform=True)
    levels = Frontier(slots).within(more + full_cost(slots))
    if levels is None:
        return []
    kept = kept_at(slots, levels)
    return [(0, space.nearest({module.name: module.saves(kept[module.name]) for module in modules}))]


def single_kind_points(modules: PrunableModules, losses: Losses, more: int) -> list[Point]:
    """Returns the best uniform points that prune a single kind of unit, and no block.

    Args:
        modules: The modules.
        losses: Losses by module and level.
        more: Allowed cost minus the current cost, usually negative.
    """
    kinds, slots, points = {module.name: module.kind for module in modules}, make_slots(modules, losses, True), []
    for kind in dict.fromkeys(kinds.values()):
        of_kind = []
        for slot in slots:
            count = len(slot.kept) if kinds[slot.names[0]] == kind else 1
            of_kind.append(Slot(slot.names, slot.kept[:count], slot.costs[:count], slot.losses[:count]))
        levels = Frontier(of_kind).within(more + full_cost(slots))
        points += [] if levels is None else [(0, levels)]
    return points


def best_point(spaces: Sequence[Space], limit: int) -> Point | None:
    """Returns the point within a limit with the lowest estimated loss; None if there is none."""
    points = [(number, levels) for number, space in enumerate(spaces) if (levels := space.best(limit)) is not None]
    return min(points, key=lambda point: spaces[point[0]].predicted(point[1]), default=None)


def evenly_sized(spaces: Sequence[Space], most: int) -> list[Point]:
    """Returns the best points at up to `most` evenly spaced sizes, the smallest first."""
    sizes = []
    for space in spaces:
        sizes += [space.rest + int(size) for size in space.frontier.costs[[0, -1]]]
    points = dict[Point, None]()
    for size in np.linspace(min(sizes), max(sizes), most):
        if (point := best_point(spaces, int(size))) is not None:
            points[point] = None
    return sorted(points, key=lambda point: spaces[point[0]].left(point[1]))


def neighbor(spaces: Sequence[Space], limit: int, point: Point, random: Random) -> Point | None:
    """Returns a random point near another point within a limit; None if it fails."""
    number, levels = point
    if len(spaces) > 1 and random.random() < 1 / 3:
        number += random.choice((-1, 1))
        best = spaces[number].best(limit) if 0 <= number < len(spaces) else None
        return None if best is None else (number, best)
    space = spaces[number]
    new = mutate(space.slots, levels, limit - space.rest, random)
    return None if new is None else (number, new)


BLOCKS = (0, 1, 2, 4)
"""Numbers of removed blocks for which uniform levels are added that just meet the budget."""


def size_costs(modules: PrunableModules, uniform: bool) -> list[dict[int, int]]:
    """Returns by slot the cost of each number of units that its modules may keep."""
    costs = []
    for group in uniform_groups(modules, uniform):
        costs.append({kept: sum(module.cost(kept) for module in group) for kept in group[0].allowed})
    return costs


def budget_sizes(modules: PrunableModules, blocks: Sequence[Block], now: int, limit: int) -> dict[str, set[int]]:
    """Returns by module further uniform numbers of units that just meet a limit."""
    met: dict[str, set[int]] = {}
    for count in BLOCKS:
        if count > len(blocks):
            continue
        left, levels = modules_outside(modules, blocks[:count]), []
        groups = uniform_groups(left, uniform=True)
        within = limit - now + sum(block.cost for block in blocks[:count])
        for group in groups:
            levels.append(group[0].levels)
            within += sum(module.cost(module.count) for module in group)
        more = sizes_at_limit(levels, size_costs(left, uniform=True), within) if levels else {}
        for number, kept in more.items():
            for group in uniform_groups(modules, uniform=True):
                if groups[number][0] in group:
                    for module in group:
                        met.setdefault(module.name, set()).update(kept)
    return met


def round_channels(modules: PrunableModules, kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
    """Rounds uniform channels down to larger multiples if that removes at most 3% more.

    The 3% are relative to the channels that the budget allows, which may lie between two allowed numbers.

    Args:
        modules: The modules, which are uniform.
        kept: By module name, the number of kept units.
        spare: Unused part of the budget.
    """
    numbers = dict(kept)
    for group in uniform_groups(modules, uniform=True):
        present, module = [module.name for module in group if kept.get(module.name, 0)], group[0]
        now = kept[present[0]] if present else module.count
        if module.kind == "channel" and now < module.count:
            within = module.cost(now) + spare / len(present)
            larger = range(now + 1, module.count)
            afforded = next((more - 1 for more in larger if module.cost(more) > within), module.count - 1)
            fewer = round_units(afforded, module.count, now, allow_more=False)
            numbers |= dict.fromkeys(present, fewer if fewer in module.allowed else now)
    return numbers
