"""How many examples are enough: as many as settle what would be removed."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from billhook.engine.batches import source_of

Chosen = Mapping[str, Sequence[int]]
"""Units by place."""
Seen = TypeVar("Seen")
"""What is known of units after some batches."""
FIRST = 4
"""Batches to begin with, at least."""


@dataclass(frozen=True)
class Settled:
    """How far a choice of units follows from the examples that it was made on.

    Attributes:
        batches: Batches that were used.
        of: Batches that there are.
        halves: The share of units on which a choice by either half of the batches alone agrees; None of one batch.
        doubling: The share on which all of them agree with the first half.
        enough: The share that was asked for.
    """

    batches: int
    of: int
    halves: float | None
    doubling: float | None
    enough: float

    @property
    def is_enough(self) -> bool:
        """Tells whether both shares are what was asked for."""
        return self.halves is not None and self.doubling is not None and min(self.halves, self.doubling) >= self.enough

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, with the sentence that says it."""
        return {**asdict(self), "says": str(self)}

    def __str__(self) -> str:
        if self.halves is None or self.doubling is None:
            return f"chosen on {self.batches} of {self.of} batches, too few to compare two halves of them"
        short = "" if self.is_enough else f", which do not settle it (asked for was {_percent(self.enough)})"
        halves = f"two halves agree on {_percent(self.halves)} of what is removed"
        doubling = f"all with the first half on {_percent(self.doubling)}"
        return f"chosen on {self.batches} of {self.of} batches{short}: {halves}, {doubling}"


def settle(
    see: Callable[[Sequence[Any]], Seen],
    join: Callable[[Seen, Seen], Seen],
    choose: Callable[[Seen], Chosen],
    batches: Sequence[Any],
    sizes: Sequence[int],
    enough: float,
) -> tuple[Seen, Settled]:
    """Takes more and more batches until a choice by them is settled, or there are no more; each is seen once.

    Args:
        see: Finds what is known of units after some batches.
        join: Finds what is known after those of the first and those of the second; it may use up both.
        choose: Chooses units by what is known of them.
        batches: All that may be used, in order (see `interleaved`).
        sizes: How many are used, one number after the other, each about twice the one before (see `steps`).
        enough: The agreement, of two halves and with half as many, that is asked for; in (0, 1].

    Returns:
        What is known after the batches that are enough, and how settled the choice is.
    """
    half = sizes[0] // 2
    seen = see(batches[:half])
    first = choose(seen)
    for number in sizes:
        others = see(batches[half:number])
        second, seen = choose(others), join(seen, others)
        whole = choose(seen)
        found = Settled(number, len(batches), agreement(first, second), agreement(first, whole), enough)
        if found.is_enough:
            break
        half, first = number, whole
    return seen, found


def steps(batches: int, halvings: int) -> list[int]:
    """Returns how many of some batches are used, one number after the other: all of them halved so often, and so on.

    >>> steps(43, 3)
    [5, 10, 21, 43]
    """
    return [batches >> halving for halving in range(halvings, -1, -1)]


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


def _percent(share: float) -> str:
    """Writes a share, rounded down so that 100 % is all.

    >>> _percent(0.99), _percent(0.9996), _percent(1.0)
    ('99%', '99.9%', '100%')
    """
    return f"{math.floor(share * 1000 + 1e-9) / 10:g}%"
