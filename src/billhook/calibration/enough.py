"""How many examples are enough: as many as settle what would be removed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.running.batches import source_of

Chosen = Mapping[str, Sequence[int]]
"""Units by place."""
FIRST = 8
"""Batches to begin with."""


@dataclass(frozen=True)
class Settled:
    """How far a choice of units follows from the examples that it was made on.

    Attributes:
        batches: Batches that were used.
        of: Batches that there are.
        halves: The share of units on which a choice by either half of the batches alone agrees.
        doubling: The share on which all of them agree with the first half.
    """

    batches: int
    of: int
    halves: float
    doubling: float

    def __str__(self) -> str:
        agree = f"two halves agree on {self.halves:.1%} of what is removed, all of them with the first on {self.doubling:.1%}"
        return f"{self.batches} of {self.of} batches: {agree}"


def settle(choose: Callable[[Sequence[Any]], Chosen], batches: Sequence[Any], enough: float) -> tuple[list[Any], Settled]:
    """Takes twice as many batches until a choice by them is settled, or there are no more; those of all sources in proportion.

    Args:
        choose: Chooses units by batches.
        batches: All that may be used.
        enough: The agreement, of two halves and with half as many, that is asked for; in (0, 1].

    Returns:
        The batches that are enough, and how settled the choice is.
    """
    mixed = interleaved(batches)
    number = min(FIRST, len(mixed))
    half, first = number // 2, None
    while True:
        first = first or choose(mixed[:half])
        whole, second = choose(mixed[:number]), choose(mixed[half:number])
        found = Settled(number, len(mixed), agreement(first, second), agreement(first, whole))
        if number == len(mixed) or min(found.halves, found.doubling) >= enough:
            return mixed[:number], found
        half, number, first = number, min(2 * number, len(mixed)), whole


def interleaved(batches: Sequence[Any]) -> list[Any]:
    """Orders batches so that the first ones hold each source in the proportion of all."""
    counts, seen = Counter(map(source_of, batches)), Counter[str]()
    places = []
    for batch in batches:
        seen[source_of(batch)] += 1
        places.append((seen[source_of(batch)] - 0.5) / counts[source_of(batch)])
    return [batch for _, batch in sorted(zip(places, batches, strict=True), key=lambda one: one[0])]


def agreement(one: Chosen, other: Chosen) -> float:
    """Returns the share of the units of one choice that are in the other, too; 1 for none.

    >>> agreement({"a": [0, 1], "b": [2, 3]}, {"a": [1, 2], "b": [2, 3]})
    0.75
    """
    units = {(place, unit) for place, own in one.items() for unit in own}
    others = {(place, unit) for place, own in other.items() for unit in own}
    return len(units & others) / max(len(units), len(others)) if units | others else 1.0
