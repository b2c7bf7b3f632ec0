"""Reckons how often the blocks of a streamed model are read until units are removed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from billhook.calibration.enough import FIRST
from billhook.importance.ablation import Ablation
from billhook.importance.activations import ActivationNorm, OutputNorm
from billhook.importance.base import Importance
from billhook.importance.baselines import RandomUnits, WeightNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.obs import OBS

REFITTED = 2
"""Passes that show which linears are called, and refit them."""
REMOVED = 3
"""Passes in which units are masked, removed, and what is left is compared."""
WITHOUT_BLOCKS = 12
"""Passes that compare what the others compute without some blocks, also with a cache: when it is planned, and when it is done."""


def batch_count(rows: Sequence[int], size: int) -> int:
    """Returns how many batches of a size so many examples of each source make.

    >>> batch_count([20, 5], 8)
    4
    """
    return sum(-(-count // size) for count in rows)


@dataclass
class Passes:
    """How often the blocks of a streamed model are read until units are removed.

    Attributes:
        known: As often as is known before.
        beside: The importances of which that is not known: a user's own.
    """

    known: int = 0
    beside: list[Importance] = field(default_factory=list)

    def to_score(self, times: int, importance: Importance, units: int, count: int, agreement: float | None) -> None:
        """Adds the passes in which an importance scores units so many times; see `to_score`."""
        once = to_score(importance, units, count, agreement)
        if once is not None:
            self.known += times * once
        elif importance not in self.beside:
            self.beside.append(importance)


def to_score(importance: Importance, units: int, count: int, agreement: float | None) -> int | None:
    """Returns how often blocks are read at most to score units; None for an importance that is not known.

    Args:
        importance: How they are scored.
        units: How many there are.
        count: How many batches there are.
        agreement: The agreement that is asked for, if scores are taken from more and more batches until it is reached.
    """
    known = {
        OutputNorm: 2,  # it looks at readers before
        ActivationNorm: 1,
        BlockInfluence: 1,
        Ablation: 1 + units,
        WeightNorm: 1,
        RandomUnits: 0,
    }
    each = importance.passes if isinstance(importance, OBS) else known.get(type(importance))
    if each is None or not importance.needs_data:
        return each
    if isinstance(importance, Ablation):
        return each * count
    if agreement is None or count < 2:
        return each
    times = 1 + max(int(math.log2(count / FIRST)), 0)
    return each * (1 + (times if importance.adds_up else 2 * times))
