"""Refines a choice of levels by evolution, on what the model made of it really loses.

As in Týr-the-Pruner (Li et al., 2025, https://arxiv.org/abs/2503.09657): some places keep more and others less, within the
budget, and the best of all that have been measured goes on.
"""

from collections.abc import Callable, Sequence
from random import Random

from billhook.shrinking.choose import Levels, Slot, cost

MOVES = 3
"""In how many slots a level is raised at once, at most."""
TRIES = 20
"""How often a new choice is looked for before there is none."""


def evolve(
    slots: Sequence[Slot],
    start: Sequence[Levels],
    limit: int,
    measure: Callable[[Levels], float],
    generations: int,
    candidates: int,
    seed: int,
) -> dict[Levels, float]:
    """Measures choices of levels, each generation near the best so far, and returns all of them with what they lose.

    Args:
        slots: The slots.
        start: Choices within the limit, from which it starts; the first is the best guess.
        limit: The most that may be left.
        measure: Returns what a choice loses.
        generations: How often new choices are made of the best; 0 measures the start alone.
        candidates: How many new choices a generation has.
        seed: Decides which ones.
    """
    random, found = Random(seed), {levels: measure(levels) for levels in dict.fromkeys(start)}
    for _ in range(generations):
        best, new = min(found, key=lambda levels: found[levels]), set[Levels]()
        for _ in range(TRIES * candidates):
            other = mutated(slots, best, limit, random)
            if len(new) < candidates and other is not None and other not in found:
                new.add(other)
        if not new:
            break
        found |= {levels: measure(levels) for levels in sorted(new)}
    return found


def mutated(slots: Sequence[Slot], levels: Levels, limit: int, random: Random) -> Levels | None:
    """Lets some slots keep more and others less, until nothing more fits; None if that cannot be."""
    now = list(levels)
    able = [number for number, level in enumerate(now) if level]
    raised = random.sample(able, min(random.randint(1, MOVES), len(able)))
    for number in raised:
        now[number] -= 1
    lower = [number for number in range(len(slots)) if number not in raised]
    while cost(slots, tuple(now)) > limit:
        able = [number for number in lower if now[number] + 1 < len(slots[number].kept)]
        if not able:
            return None
        now[random.choice(able)] += 1
    while fitting := [number for number in range(len(slots)) if _fits(slots, now, number, limit)]:
        now[random.choice(fitting)] -= 1
    return tuple(now)


def _fits(slots: Sequence[Slot], levels: Sequence[int], number: int, limit: int) -> bool:
    """Tells whether a slot may keep more."""
    slot, level = slots[number], levels[number]
    return level > 0 and cost(slots, tuple(levels)) - slot.costs[level] + slot.costs[level - 1] <= limit
