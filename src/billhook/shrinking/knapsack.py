"""Chooses a level per slot with the smallest total loss within a budget.

A multiple-choice knapsack, solved by dynamic programming over Pareto-optimal choices ("Discrete dynamic programming and capital
allocation", Nemhauser & Ullmann, 1969). Modules of one shape have equal costs, so there are few different sums and the solution
is exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np
from numpy.typing import NDArray

MOST = 20_000
"""Maximum number of partial choices; beyond it, evenly spaced choices are kept."""

CHOICES = 100
"""Above this number of choices, levels come close enough to a limit without extra levels."""

Levels = tuple[int, ...]
"""Index of the chosen level of each slot; level 0 keeps all units."""


@dataclass(frozen=True)
class Slot:
    """Modules that share a level.

    Attributes:
        names: The modules.
        kept: Units that each module keeps, by level, decreasing.
        costs: Remaining cost, by level, decreasing.
        losses: Loss, by level, starting at 0.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, level: int) -> dict[str, int]:
        """Returns the number of kept units of each module at a level."""
        return dict.fromkeys(self.names, self.kept[level])


@dataclass(frozen=True)
class JointSlot:
    """Modules whose numbers of units are chosen jointly, such as all modules of a block.

    Attributes:
        kept: By level, the units that each module keeps.
        costs: Remaining cost, by level, decreasing.
        losses: Loss, by level, starting at 0.
    """

    kept: tuple[Mapping[str, int], ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, level: int) -> dict[str, int]:
        """Returns the number of kept units of each module at a level."""
        return dict(self.kept[level])


Slots = Sequence[Slot | JointSlot]


class Frontier:
    """The Pareto-optimal choices of levels in cost and loss.

    >>> slots = [Slot(("a",), (4, 2), (40, 20), (0.0, 0.3)), Slot(("b",), (4, 2), (40, 20), (0.0, 0.1))]
    >>> frontier = Frontier(slots)
    >>> frontier.within(65), frontier.within(30)
    ((0, 1), None)
    """

    def __init__(self, slots: Slots) -> None:
        self.costs, self.losses = np.zeros(1, dtype=np.int64), np.zeros(1)
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for slot in slots:
            count = len(slot.costs)
            costs = (self.costs[:, None] + np.array(slot.costs, dtype=np.int64)).reshape(-1)
            losses = (self.losses[:, None] + np.array(slot.losses)).reshape(-1)
            order = np.lexsort((losses, costs))
            lowest = np.minimum.accumulate(losses[order])
            best = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
            if len(best) > MOST:
                best = best[np.linspace(0, len(best) - 1, MOST).round().astype(np.int64)]
            self.costs, self.losses = costs[best], losses[best]
            self._steps.append((best // count, best % count))

    def within(self, limit: int) -> Levels | None:
        """Returns the choice with the smallest loss within a cost limit, or None."""
        number = int(np.searchsorted(self.costs, limit, side="right")) - 1
        return None if number < 0 else self.levels(number)

    def levels(self, number: int) -> Levels:
        """Returns the levels of a choice, by its index in order of cost."""
        chosen = []
        for parents, levels in reversed(self._steps):
            chosen.append(int(levels[number]))
            number = int(parents[number])
        return tuple(reversed(chosen))


def cost(slots: Slots, levels: Levels) -> int:
    """Returns the total cost of a choice of levels."""
    return sum(slot.costs[level] for slot, level in zip(slots, levels, strict=True))


def loss(slots: Slots, levels: Levels) -> float:
    """Returns the total loss of a choice of levels."""
    return sum(slot.losses[level] for slot, level in zip(slots, levels, strict=True))


def kept_at(slots: Slots, levels: Levels) -> dict[str, int]:
    """Returns the number of kept units of each module at a choice of levels."""
    return {name: kept for slot, level in zip(slots, levels, strict=True) for name, kept in slot.at(level).items()}


def join_slots(slots: Sequence[Slot]) -> Slot:
    """Joins slots with equal levels into a slot whose modules share a level.

    >>> join_slots([Slot(("a",), (4, 2), (40, 20), (0.0, 0.5)), Slot(("b",), (4, 2), (40, 20), (0.0, 0.25))])
    Slot(names=('a', 'b'), kept=(4, 2), costs=(80, 40), losses=(0.0, 0.75))
    """
    names, costs, losses = list[str](), [], []
    for slot in slots:
        names += slot.names
    for level in range(len(slots[0].kept)):
        levels = (level,) * len(slots)
        costs.append(cost(slots, levels))
        losses.append(loss(slots, levels))
    return Slot(tuple(names), slots[0].kept, tuple(costs), tuple(losses))


def pareto_slot(options: Sequence[tuple[int, float, Mapping[str, int]]]) -> JointSlot:
    """Returns a slot of Pareto-optimal options (cost, loss, kept units); the first stays."""
    first, best = options[0], list[tuple[int, float, Mapping[str, int]]]()
    for option in sorted(options[1:], key=lambda option: option[:2]):
        if not best or option[1] < best[-1][1]:
            best.append(option)
    costs, losses, kept = zip(first, *(option for option in reversed(best) if option[0] < first[0]), strict=True)
    return JointSlot(kept, costs, losses)


def fill_budget(slots: Sequence[Slot], levels: Levels, limit: int, costs: Sequence[Mapping[int, int]]) -> list[int]:
    """Adds units to slots, also between levels, while the cost stays within the limit.

    Slots with the largest gain per cost come first. Afterwards no slot can take another step.

    Args:
        slots: The slots.
        levels: A choice of levels within the limit.
        limit: Largest allowed cost.
        costs: By slot, the cost of each number of units that its modules may keep.

    Returns:
        The number of units that the modules of each slot keep.
    """
    kept = [slot.kept[level] for slot, level in zip(slots, levels, strict=True)]
    spare = limit - cost(slots, levels)

    def gain(number: int) -> float:
        slot, level = slots[number], levels[number]
        paid = slot.costs[level - 1] - slot.costs[level]
        return (slot.losses[level] - slot.losses[level - 1]) / max(paid, 1)

    for number in sorted(np.flatnonzero(levels).tolist(), key=gain, reverse=True):
        paid = costs[number][kept[number]]
        most = max(n for n, price in costs[number].items() if n <= slots[number].kept[0] and price - paid <= spare)
        spare -= costs[number][most] - paid
        kept[number] = most
    return kept


def interpolated_loss(slot: Slot, kept: int) -> float:
    """Returns the loss of a slot at a number of units, interpolated between its levels.

    >>> interpolated_loss(Slot(("a",), (4, 2), (40, 20), (0.0, 0.5)), 3)
    0.25
    """
    return float(np.interp(kept, slot.kept[::-1], slot.losses[::-1]))


def sizes_at_limit(kept: Sequence[Sequence[int]], costs: Sequence[Mapping[int, int]], limit: int) -> dict[int, set[int]]:
    """Finds numbers of units that just meet a limit, given the levels of all other slots.

    With few slots and levels far apart, no choice of levels alone would come close to the limit.

    Args:
        kept: By slot, the units that its modules keep at each level.
        costs: By slot, the cost of each number of units that its modules may keep.
        limit: Largest allowed cost.

    Returns:
        Numbers of units by the index of the slot with the finest steps; empty if there are too many choices.

    >>> sizes_at_limit([(4, 2), (100, 50)], [{kept: 20 * kept for kept in (4, 3, 2, 1)}, {n: n for n in range(100, 0, -1)}], 130)
    {1: {50, 90}}
    """

    def unit_cost(number: int) -> float:
        price = costs[number]
        most, least = max(price), min(price)
        return (price[most] - price[least]) / (most - least) or math.inf

    finest = min(range(len(kept)), key=unit_cost)
    others = []
    for number, numbers in enumerate(kept):
        if number != finest:
            others.append([costs[number][n] for n in numbers])
    if math.prod(map(len, others)) > CHOICES:
        return {}
    met = set()
    for paid in product(*others):
        fits = [number for number, price in costs[finest].items() if sum(paid) + price <= limit]
        met |= {max(fits)} if fits else set()
    return {finest: met}


MOVES = 3
"""Maximum number of slots whose level is raised in one mutation."""


def mutate(slots: Slots, levels: Levels, limit: int, random: Random) -> Levels | None:
    """Trades units between slots within the limit; returns None if it fails."""
    chosen = list(levels)

    def paid(number: int) -> int:
        slot, level = slots[number], chosen[number]
        return slot.costs[level - 1] - slot.costs[level]

    able = np.flatnonzero(levels).tolist()
    raised = random.sample(able, min(random.randint(1, MOVES), len(able)))
    for number in raised:
        chosen[number] -= 1
    spent = cost(slots, tuple(chosen))
    while spent > limit:
        able = [n for n, slot in enumerate(slots) if n not in raised and chosen[n] + 1 < len(slot.costs)]
        if not able:
            return None
        number = random.choice(able)
        chosen[number] += 1
        spent -= paid(number)
    while fitting := [number for number, level in enumerate(chosen) if level and spent + paid(number) <= limit]:
        number = random.choice(fitting)
        spent += paid(number)
        chosen[number] -= 1
    return tuple(chosen)
