"""Which blocks go, by how much they matter: the lowest at once, or one at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.importance.blocks import By, Scores, block_trial, check_by, score_blocks, sizes_of
from billhook.model.find import find_transformer
from billhook.running.batches import Loss
from billhook.running.undisturbed import resting
from billhook.units.blocks import find_blocks

"""By stack, how much each block matters: `[blocks]`."""


@dataclass(frozen=True)
class Quota:
    """How many blocks of each stack go, and which may not.

    Attributes:
        count: How many go.
        ratio: Instead of `count`, the fraction that goes, in [0, 1), rounded down.
        first: So many first blocks stay.
        last: So many last blocks stay.

    Raises:
        ValueError: If one is not legal.
    """

    count: int | None = None
    ratio: float | None = None
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        if (self.count is None) == (self.ratio is None):
            raise ValueError(f"count={self.count}, ratio={self.ratio}: give one of them")
        if self.ratio is not None and (not isinstance(self.ratio, int | float) or not 0 <= self.ratio < 1):
            raise ValueError(f"ratio={self.ratio!r} must be in [0, 1)")
        for name, value in {"count": self.count or 0, "first": self.first, "last": self.last}.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, 0 or more")

    def of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many blocks go, by stack.

        Args:
            sizes: How many there are, by stack.

        Raises:
            ValueError: If so many cannot go; the message says how many can.
        """
        numbers: dict[str, int] = {}
        for name, size in sizes.items():
            free = max(size - max(self.first + self.last, 1), 0)
            numbers[name] = int((self.ratio or 0) * size + 1e-9) if self.count is None else self.count
            if numbers[name] > free:
                asked = f"ratio={self.ratio}" if self.count is None else f"count={self.count}"
                raise ValueError(
                    f"{asked} takes {numbers[name]} of the {size} blocks of {name}; with first={self.first} and last={self.last} "
                    f"protected, 0 to {free} can go"
                )
        return numbers


def choose_lowest(importance: Mapping[str, Tensor], quota: Quota) -> dict[str, list[int]]:
    """The least important blocks of each stack; of equal ones the later.

    Raises:
        ValueError: If so many cannot go.
    """
    numbers = quota.of({name: len(scores) for name, scores in importance.items()})
    return {name: _lowest(importance[name], number, quota) for name, number in numbers.items()}


def choose_greedily(
    rank: Callable[[Mapping[str, list[int]]], Scores], sizes: Mapping[str, int], quota: Quota
) -> dict[str, list[int]]:
    """Chooses the least important block of each stack, ranks again without it, and so on; in the order of choice.

    Args:
        rank: Scores of all blocks when some are gone, which have infinite ones.
        sizes: How many blocks each stack has.
        quota: How many go.

    Raises:
        ValueError: If so many cannot go.
    """
    numbers = quota.of(sizes)
    gone: dict[str, list[int]] = {name: [] for name in sizes}
    while any(len(gone[name]) < number for name, number in numbers.items()):
        scores = rank(gone)
        for name, number in numbers.items():
            if len(gone[name]) < number:
                gone[name] += _lowest(scores[name], 1, quota)
    return gone


def _lowest(scores: Tensor, count: int, quota: Quota) -> list[int]:
    free = range(quota.first, len(scores) - quota.last)
    return sorted(free, key=lambda place: (float(scores[place]), -place))[:count]


def greedy_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    count: int | None = None,
    ratio: float | None = None,
    by: By = "loss",
    first: int = 0,
    last: int = 0,
    loss: Loss | None = None,
) -> dict[str, list[int]]:
    """Chooses blocks one at a time, and ranks those that are left again without them.

    Args:
        model: As in `block_importance`.
        batches: As in `block_importance`.
        count: How many blocks of each stack go.
        ratio: Instead of `count`, the fraction of each stack that goes, in [0, 1), rounded down.
        by: As in `block_importance`.
        first: Of each stack so many first blocks stay.
        last: Of each stack so many last blocks stay.
        loss: As in `block_importance`.

    Returns:
        By stack, the blocks that go, in the order in which they were chosen.

    Raises:
        ValueError: As `block_importance`, or if `count` or `ratio` cannot be reached.
    """
    check_by(by)
    quota = Quota(count, ratio, first, last)
    subject = find_transformer(model)
    stacks = find_blocks(subject)
    trials = [block_trial(subject, stacks, batch, loss) for batch in batches]
    with resting(subject), torch.no_grad():
        return choose_greedily(partial(score_blocks, stacks, trials, by), sizes_of(stacks), quota)
