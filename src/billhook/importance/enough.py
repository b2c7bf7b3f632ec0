"""Scores units on as many batches as settle what would be removed, each of which is scored once."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from billhook.bar import Told
from billhook.calibration.enough import FIRST, Chosen, Settled, interleaved, settle, steps
from billhook.engine.batches import telling
from billhook.importance.base import Sums
from billhook.importance.score import Scoring, run_of


def score_enough(
    scoring: Scoring,
    batches: Iterable[Any],
    choose: Callable[[dict[str, Tensor]], Chosen],
    enough: float | None,
    progress: Told | None = None,
) -> tuple[dict[str, Tensor], Settled | None]:
    """Scores units on more and more batches, until a choice by the scores is settled.

    The sums over batches add up, so that each batch is scored once; where an importance says that its own do not, a step scores
    all of its batches again.

    Args:
        scoring: How units are scored.
        batches: All that may be used, on each rank as many, or one fewer.
        choose: Chooses units by their scores, which it may change.
        enough: The agreement that is asked for, in (0, 1]; None uses all batches.
        progress: Is called with how many batches have been scored, and how many may be.

    Returns:
        The scores, and how settled the choice is; None where it does not depend on batches, or all of them are to be used.
    """
    if progress is not None and scoring.importance.needs_data:
        batches = telling([run_of(scoring.model, scoring.units, batch, scoring.loss) for batch in batches], progress)
    if enough is None or not scoring.importance.needs_data:
        return scoring.scores(scoring.sums(batches)), None
    mixed = interleaved(list(batches))
    count, ranks = _total(scoring, [len(mixed), 1])
    if count < 2 * ranks:
        return scoring.scores(scoring.sums(mixed)), Settled(count, count, None, None, enough)
    sizes = steps(len(mixed), max(int(math.log2(count / max(FIRST, 2 * ranks))), 0))
    how = partial(_Seen.of, scoring), partial(_joined, scoring), lambda seen: choose(scoring.scores(seen.sums))
    seen, settled = settle(*how, mixed, sizes, enough)
    used = _total(scoring, sizes)[sizes.index(settled.batches)]
    return scoring.scores(seen.sums), replace(settled, batches=used, of=count)


@dataclass
class _Seen:
    """Batches, and the sums over them."""

    batches: list[Any]
    sums: Sums

    @classmethod
    def of(cls, scoring: Scoring, batches: Iterable[Any]) -> "_Seen":
        """Sums over batches."""
        given = list(batches)
        return cls(given, scoring.sums(given))


def _joined(scoring: Scoring, one: _Seen, other: _Seen) -> _Seen:
    """Sums over the batches of both, without scoring them again if that can be."""
    batches = one.batches + other.batches
    if not scoring.importance.adds_up:
        return _Seen.of(scoring, batches)
    one.sums.merge(other.sums)
    return _Seen(batches, one.sums)


def _total(scoring: Scoring, numbers: list[int]) -> list[int]:
    """Sums numbers over ranks."""
    total: list[int] = scoring.comm(torch.tensor(numbers, device=scoring.comm.device)).tolist()
    return total
