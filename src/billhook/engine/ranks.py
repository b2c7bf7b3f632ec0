"""Divides work over the ranks that sum what they have."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Ranks that work on one model, each on data of its own: called with a tensor, they sum it over all, in place.

    Attributes:
        number: Which one this is, from 0 on.
        count: How many there are.
        add: Sums a tensor over all of them, in place, and returns it; every rank calls it, in the same order.
        shared: Whether ranks share each batch, as in training; otherwise every batch is one rank's.
    """

    number: int
    count: int
    add: Callable[[Tensor], Tensor]
    shared: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        return self.add(tensor)


def checked(reduce: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """Has a function that sums over ranks refused as soon as it does not return what it has summed.

    >>> checked(lambda tensor: None)(torch.ones(1))
    Traceback (most recent call last):
    ValueError: reduce: it must return the tensor that it has summed, and returned None
    """
    if reduce is None or isinstance(reduce, Ranks):
        return reduce

    def summed(tensor: Tensor) -> Tensor:
        found = reduce(tensor)
        if not isinstance(found, Tensor):
            raise ValueError(f"reduce: it must return the tensor that it has summed, and returned {found!r}")
        return found

    return summed


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


def rows_of(count: int, most: int, reduce: Callable[[Tensor], Tensor] | None) -> list[slice]:
    """Picks this rank's rows of a matrix, some at a time; all, if ranks are not known.

    Args:
        count: How many rows there are.
        most: How many are taken at a time, at most.
        reduce: The ranks; a function that only sums does not say which one this is.

    >>> rows_of(5, 2, Ranks(1, 2, Tensor.add_)), rows_of(5, 4, None)
    ([slice(2, 4, None)], [slice(0, 3, None), slice(3, 5, None)])
    """
    number, ranks = (reduce.number, reduce.count) if isinstance(reduce, Ranks) else (0, 1)
    size = math.ceil(count / (ranks * math.ceil(count / (most * ranks))))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)][number::ranks]


def lists_of(
    own: Sequence[int], reduce: Callable[[Tensor], Tensor] | None, device: torch.device | str = "cpu"
) -> list[list[int]]:
    """Lists the numbers that each rank has; this one's alone, if ranks are not known.

    Args:
        own: The numbers of this rank, which may have none.
        reduce: The ranks; a function that only sums does not say which one this is.
        device: Where sums are.
    """
    if not isinstance(reduce, Ranks):
        return [list(own)]
    counts = torch.zeros(reduce.count, dtype=torch.int64, device=device)
    counts[reduce.number] = len(own)
    many = reduce(counts).tolist()
    table = counts.new_zeros(reduce.count, max(1, *many))
    table[reduce.number, : len(own)] = torch.tensor(own, dtype=torch.int64, device=device)
    return [row[:count] for row, count in zip(reduce(table).tolist(), many, strict=True)]


def dealt(counts: Sequence[int], reduce: Callable[[Tensor], Tensor] | None) -> tuple[int, list[int]]:
    """Counts the batches of all ranks together, and numbers this one's among them, as one process has them.

    They were dealt out in turn: each rank's first one, rank by rank, then their second ones. Where ranks share batches, their
    first ones are parts of one batch, and so on; but where none has more than one, these are batches of their own.

    Args:
        counts: How many each rank has, as `lists_of` tells.
        reduce: The ranks.

    >>> dealt([2, 1], Ranks(1, 2, Tensor.add_)), dealt([2, 1], Ranks(1, 2, Tensor.add_, shared=True))
    ((3, [1]), (2, [0]))
    """
    number = reduce.number if isinstance(reduce, Ranks) else 0
    if isinstance(reduce, Ranks) and reduce.shared and max(counts) > 1:
        return max(counts), list(range(counts[number]))
    order = sorted((place, rank) for rank, count in enumerate(counts) for place in range(count))
    return len(order), [at for at, (_, rank) in enumerate(order) if rank == number]
