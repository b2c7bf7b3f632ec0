"""Chooses a level for each slot so that the least is lost within a budget: pure functions on numbers.

A multiple-choice knapsack, solved by dynamic programming over what nothing else beats ("Discrete dynamic programming and capital
allocation", Nemhauser & Ullmann, 1969). As layers are alike, there are few different costs, and the solution is exact.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

MOST = 20_000
"""How many partial choices are kept at most; beyond that, evenly spaced ones."""

CHOICES = 100
"""With more choices than that, levels come close enough to a limit."""

Levels = tuple[int, ...]
"""The number of a level for each slot; 0 keeps all."""


@dataclass(frozen=True)
class Slot:
    """Layers that take one level together.

    Attributes:
        names: The layers.
        kept: How many units each of them keeps at each level, falling, from all on.
        costs: What is left at each level of what the budget limits, falling.
        losses: What is lost at each level, from 0 on.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, level: int) -> dict[str, int]:
        """Returns how many units each layer keeps at a level."""
        return dict.fromkeys(self.names, self.kept[level])


@dataclass(frozen=True)
class Joint:
    """Layers whose numbers of units are chosen together, such as all of a block.

    Attributes:
        kept: By level, how many units each of them keeps, from all on.
        costs: What is left at each level of what the budget limits, falling.
        losses: What is lost at each level, from 0 on.
    """

    kept: tuple[Mapping[str, int], ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, level: int) -> dict[str, int]:
        """Returns how many units each layer keeps at a level."""
        return dict(self.kept[level])


class Frontier:
    """The choices of levels that no other beats in both cost and loss.

    >>> slots = [Slot(("a",), (4, 2), (40, 20), (0.0, 0.3)), Slot(("b",), (4, 2), (40, 20), (0.0, 0.1))]
    >>> frontier = Frontier(slots)
    >>> frontier.within(65), frontier.within(30)
    ((0, 1), None)
    """

    def __init__(self, slots: Sequence[Slot | Joint]) -> None:
        self.costs, self.losses = np.zeros(1, dtype=np.int64), np.zeros(1)
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for slot in slots:
            count = len(slot.costs)
            costs = (self.costs[:, None] + np.array(slot.costs, dtype=np.int64)).reshape(-1)
            losses = (self.losses[:, None] + np.array(slot.losses)).reshape(-1)
            best = _unbeaten(costs, losses)
            self.costs, self.losses = costs[best], losses[best]
            self._steps.append((best // count, best % count))

    def within(self, limit: int) -> Levels | None:
        """Returns the choice that loses least at a cost of at most the limit; None if none is so cheap."""
        number = int(np.searchsorted(self.costs, limit, side="right")) - 1
        return None if number < 0 else self.levels(number)

    def levels(self, number: int) -> Levels:
        """Returns the levels of a choice, by its number, from the cheapest on."""
        chosen = list[int]()
        for parents, levels in reversed(self._steps):
            chosen.append(int(levels[number]))
            number = int(parents[number])
        return tuple(reversed(chosen))


def _unbeaten(costs: NDArray[np.int64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the numbers of those that cost less, or lose less, than each other one, by rising cost."""
    order = np.lexsort((losses, costs))
    lowest = np.minimum.accumulate(losses[order])
    better = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    best: NDArray[np.int64] = order[better]
    return best if len(best) <= MOST else best[np.linspace(0, len(best) - 1, MOST).round().astype(np.int64)]


def cost(slots: Sequence[Slot | Joint], levels: Levels) -> int:
    """Adds up what levels cost."""
    return sum(slot.costs[level] for slot, level in zip(slots, levels, strict=True))


def loss(slots: Sequence[Slot | Joint], levels: Levels) -> float:
    """Adds up what levels lose."""
    return sum(slot.losses[level] for slot, level in zip(slots, levels, strict=True))


def kept_at(slots: Sequence[Slot | Joint], levels: Levels) -> dict[str, int]:
    """Returns how many units each layer keeps at levels."""
    return {name: kept for slot, level in zip(slots, levels, strict=True) for name, kept in slot.at(level).items()}


def joined(slots: Sequence[Slot]) -> Slot:
    """Joins slots of the same levels to one, all of whose layers take one level.

    >>> joined([Slot(("a",), (4, 2), (40, 20), (0.0, 0.5)), Slot(("b",), (4, 2), (40, 20), (0.0, 0.25))])
    Slot(names=('a', 'b'), kept=(4, 2), costs=(80, 40), losses=(0.0, 0.75))
    """
    names = tuple(name for slot in slots for name in slot.names)
    costs = tuple(map(sum, zip(*(slot.costs for slot in slots), strict=True)))
    losses = tuple(map(sum, zip(*(slot.losses for slot in slots), strict=True)))
    return Slot(names, slots[0].kept, costs, losses)


def product_of(slots: Sequence[Slot], rest: int = 0) -> Joint:
    """Combines slots to one whose levels are all combinations of theirs that no other beats in both cost and loss.

    Args:
        slots: The slots.
        rest: What is left besides, at all levels.

    >>> product_of([Slot(("a",), (2, 1), (4, 2), (0.0, 0.5)), Slot(("b",), (2, 1), (6, 3), (0.0, 0.25))]).kept
    ({'a': 2, 'b': 2}, {'a': 2, 'b': 1}, {'a': 1, 'b': 1})
    """
    every = product(*(range(len(slot.costs)) for slot in slots))
    return best_of([(rest + cost(slots, levels), loss(slots, levels), kept_at(slots, levels)) for levels in every])


def best_of(options: Sequence[tuple[int, float, Mapping[str, int]]]) -> Joint:
    """Makes a slot of options, of cost, loss and units kept, without those that another beats; the first keeps all and stays."""
    first, best = options[0], list[tuple[int, float, Mapping[str, int]]]()
    for option in sorted(options[1:], key=lambda option: option[:2]):
        if not best or option[1] < best[-1][1]:
            best.append(option)
    costs, losses, kept = zip(first, *(option for option in reversed(best) if option[0] < first[0]), strict=True)
    return Joint(kept, costs, losses)


def filled(slots: Sequence[Slot], levels: Levels, limit: int, costs: Sequence[Mapping[int, int]]) -> list[int]:
    """Lets slots keep more units, between levels too, as long as that is within the limit.

    Those whose next level up gains most for its cost come first, and then no slot can take a single step more.

    Args:
        slots: The slots.
        levels: A choice of levels, within the limit.
        limit: The most that may be left.
        costs: By slot, and by all numbers of units that its layers may keep, what they cost.

    Returns:
        By slot, how many units its layers keep.
    """
    kept = [slot.kept[level] for slot, level in zip(slots, levels, strict=True)]
    spare = limit - cost(slots, levels)

    def gain(number: int) -> float:
        slot, level = slots[number], levels[number]
        paid = slot.costs[level - 1] - slot.costs[level]
        return (slot.losses[level] - slot.losses[level - 1]) / max(paid, 1)

    for number in sorted((n for n, level in enumerate(levels) if level), key=gain, reverse=True):
        paid = costs[number][kept[number]]
        within = (n for n, price in costs[number].items() if n <= slots[number].kept[0] and price - paid <= spare)
        most = max(within)
        spare -= costs[number][most] - paid
        kept[number] = most
    return kept


def between(slot: Slot, kept: int) -> float:
    """Interpolates what is lost where a slot keeps a number of units between levels.

    >>> between(Slot(("a",), (4, 2), (40, 20), (0.0, 0.5)), 3)
    0.25
    """
    return float(np.interp(kept, slot.kept[::-1], slot.losses[::-1]))


def widest(kept: Sequence[Sequence[int]], costs: Sequence[Mapping[int, int]], limit: int) -> dict[int, set[int]]:
    """Finds the numbers of units that just meet a limit, next to each choice of levels of all other slots.

    With few slots, whose levels are far apart, no choice of levels alone would come close.

    Args:
        kept: By slot, how many units its layers keep at each level.
        costs: By slot, and by all numbers of units that its layers may keep, what they cost.
        limit: The most that may be left.

    Returns:
        By the number of the slot that has the finest steps, numbers of units; nothing where there are too many choices.

    >>> widest([(4, 2), (100, 50)], [{kept: 20 * kept for kept in (4, 3, 2, 1)}, {kept: kept for kept in range(100, 0, -1)}], 130)
    {1: {50, 90}}
    """
    steps = [(price[max(price)] - price[min(price)]) / (max(price) - min(price)) for price in costs]  # of one unit
    finest = min(range(len(kept)), key=lambda number: steps[number] or math.inf)
    others = [[costs[number][n] for n in numbers] for number, numbers in enumerate(kept) if number != finest]
    if math.prod(map(len, others)) > CHOICES:
        return {}
    met = set[int]()
    for paid in product(*others):
        fits = [number for number, price in costs[finest].items() if sum(paid) + price <= limit]
        met |= {max(fits)} if fits else set()
    return {finest: met}


Choice = TypeVar("Choice", bound=tuple[Any, ...])
MOVES = 3
"""In how many slots a level is raised at once, at most."""
TRIES = 20
"""How often a new choice is looked for before there is none."""


def evolve(
    start: Sequence[Choice],
    move: Callable[[Choice, Random], Choice | None],
    measure: Callable[[Choice], float],
    generations: int,
    candidates: int,
    seed: int,
) -> dict[Choice, float]:
    """Measures choices, each generation near the best so far, and returns all of them with what they lose.

    As in Týr-the-Pruner (Li et al., 2025, https://arxiv.org/abs/2503.09657): some layers keep more and others less, within the
    budget, and the best of all that have been measured goes on.

    Args:
        start: Choices within the limit, from which it starts.
        move: Makes a choice within the limit of another, near it; None where that cannot be.
        measure: Returns what a choice loses.
        generations: How often new choices are made of the best; 0 measures the start alone.
        candidates: How many new choices a generation has.
        seed: Decides which ones.
    """
    random, losses = Random(seed), {choice: measure(choice) for choice in dict.fromkeys(start)}
    for _ in range(generations):
        best, new = min(losses, key=lambda choice: losses[choice]), set[Choice]()
        for _ in range(TRIES * candidates):
            other = move(best, random)
            if len(new) < candidates and other is not None and other not in losses:
                new.add(other)
        if not new:
            break
        losses |= {choice: measure(choice) for choice in sorted(new)}
    return losses


def mutated(slots: Sequence[Slot | Joint], levels: Levels, limit: int, random: Random) -> Levels | None:
    """Lets some slots keep more and others less, until nothing more fits; None if that cannot be."""
    chosen = list(levels)
    able = [number for number, level in enumerate(chosen) if level]
    raised = random.sample(able, min(random.randint(1, MOVES), len(able)))
    for number in raised:
        chosen[number] -= 1
    lower = [number for number in range(len(slots)) if number not in raised]
    spent = cost(slots, tuple(chosen))
    while spent > limit:
        able = [number for number in lower if chosen[number] + 1 < len(slots[number].costs)]
        if not able:
            return None
        number = random.choice(able)
        chosen[number] += 1
        spent += slots[number].costs[chosen[number]] - slots[number].costs[chosen[number] - 1]

    def paid(number: int) -> int:
        """Counts what it costs that a slot keeps more."""
        slot, level = slots[number], chosen[number]
        return slot.costs[level - 1] - slot.costs[level]

    while fitting := [number for number, level in enumerate(chosen) if level and spent + paid(number) <= limit]:
        number = random.choice(fitting)
        spent += paid(number)
        chosen[number] -= 1
    return tuple(chosen)
