"""Fits under FSDP2 by four processes: side by side, or as two nodes of two."""

import json
import sys
from pathlib import Path

import torch

import billhook as bh
from kit.forked import forked_ranks
from kit.settings import Descends, fit
from kit.sharding import GIVEN, SOME, Own, shapes


def of_two_nodes():
    return Descends(batch=4, nodes=2)


ENOUGH = SOME | {"calibration": 8}
"""Two batches for each rank."""


FOUR = {
    "two nodes of two": shapes(lambda: bh.HeadPruning(0.5, at=2, **SOME), lambda: Own(batch=4, nodes=2)),
    "accumulated, clipped": shapes(
        lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, **SOME),
        lambda: Own(batch=4, nodes=2),
        accumulate_grad_batches=2, gradient_clip_val=0.1, max_epochs=-1,
    ),
    "a rank without calibration": shapes(lambda: bh.DepthPruning(1, at=2, **GIVEN), lambda: Own(batch=4)),
    "KV heads by svd": shapes(lambda: bh.KVHeadConversion(2, at=2, method="svd", **ENOUGH), of_two_nodes),
}  # fmt: skip


def fit_four() -> None:
    """What each of four processes runs."""
    fit(FOUR, 4)
    torch.distributed.barrier()


def fork_four() -> None:
    """Forks four processes, so that what they need is imported once."""
    _, out, _ = json.loads(sys.argv[1])
    ended = forked_ranks(fit_four, 4, lambda number: Path(out, f"{number}.log"), seconds=400)
    assert all(code == 0 for code, _ in ended), ended
