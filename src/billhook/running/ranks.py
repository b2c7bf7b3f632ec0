"""Divides work over the ranks that sum what they have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Ranks that work on one model, each on data of its own: called with a tensor, they sum it over all, in place.

    Attributes:
        number: Which one this is, from 0 on.
        count: How many there are.
        add: Sums a tensor over all of them, in place, and returns it; every rank calls it, in the same order.
    """

    number: int
    count: int
    add: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        return self.add(tensor)


def own_of(costs: Sequence[float], reduce: Callable[[Tensor], Tensor] | None) -> list[bool]:
    """Picks this rank's pieces of work, so that no rank has much more than others; all, if ranks are not known.

    The dearest piece goes first, each to the rank with the least so far.

    Args:
        costs: What each piece costs, the same on all ranks.
        reduce: The ranks; a function that only sums does not say which one this is.

    >>> add = Tensor.add_
    >>> own_of([1, 5, 2, 2], Ranks(0, 2, add)), own_of([1, 5, 2, 2], Ranks(1, 2, add))
    ([False, True, False, False], [True, False, True, True])
    """
    if not isinstance(reduce, Ranks):
        return [True] * len(costs)
    done, owner = [0.0] * reduce.count, dict[int, int]()
    for piece in sorted(range(len(costs)), key=lambda one: -costs[one]):
        owner[piece] = done.index(min(done))
        done[owner[piece]] += costs[piece]
    return [owner[piece] == reduce.number for piece in range(len(costs))]
