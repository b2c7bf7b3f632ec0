"""Refines a choice of levels by evolution, on what the model made of it really loses.

As in Týr-the-Pruner (Li et al., 2025, https://arxiv.org/abs/2503.09657): some places keep more and others less, within the
budget, and the best of all that have been measured goes on.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from billhook.shrinking.choose import Joint, Levels, Slot, cost

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

    Args:
        start: Choices within the limit, from which it starts.
        move: Makes a choice within the limit of another, near it; None where that cannot be.
        measure: Returns what a choice loses.
        generations: How often new choices are made of the best; 0 measures the start alone.
        candidates: How many new choices a generation has.
        seed: Decides which ones.
    """
    random, found = Random(seed), {choice: measure(choice) for choice in dict.fromkeys(start)}
    for _ in range(generations):
        best, new = min(found, key=lambda choice: found[choice]), set[Choice]()
        for _ in range(TRIES * candidates):
            other = move(best, random)
            if len(new) < candidates and other is not None and other not in found:
                new.add(other)
        if not new:
            break
        found |= {choice: measure(choice) for choice in sorted(new)}
    return found


def mutated(slots: Sequence[Slot | Joint], levels: Levels, limit: int, random: Random) -> Levels | None:
    """Lets some slots keep more and others less, until nothing more fits; None if that cannot be."""
    now = list(levels)
    able = [number for number, level in enumerate(now) if level]
    raised = random.sample(able, min(random.randint(1, MOVES), len(able)))
    for number in raised:
        now[number] -= 1
    lower = [number for number in range(len(slots)) if number not in raised]
    while cost(slots, tuple(now)) > limit:
        able = [number for number in lower if now[number] + 1 < len(slots[number].costs)]
        if not able:
            return None
        now[random.choice(able)] += 1
    while fitting := [number for number in range(len(slots)) if _fits(slots, now, number, limit)]:
        now[random.choice(fitting)] -= 1
    return tuple(now)


def _fits(slots: Sequence[Slot | Joint], levels: Sequence[int], number: int, limit: int) -> bool:
    """Tells whether a slot may keep more."""
    slot, level = slots[number], levels[number]
    return level > 0 and cost(slots, tuple(levels)) - slot.costs[level] + slot.costs[level - 1] <= limit
