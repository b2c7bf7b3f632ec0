"""Fits under FSDP2 of all that a Trainer or a module may set: precisions, offloading, recomputed activations, uneven batches."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

import billhook as bh
from kit.sharding import GIVEN, SOME, Fit, Own, checkpointed, keep, shapes


class Descends(Own):
    """By SGD, since Adam makes much of gradients near zero, and its epsilon is 0 in float16."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def offloaded(**given):
    return Descends(offload_policy=CPUOffloadPolicy(pin_memory=False), **given)


CHANGES = {
    "channels by gradients": lambda at: bh.StructuredPruning(
        bh.Amount(channels=0.5), at=at, importance=bh.Taylor(), repair=None, **GIVEN
    ),
    "heads": lambda at: bh.HeadPruning(0.5, at=at, **GIVEN),
    "blocks": lambda at: bh.DepthPruning(1, at=at, **GIVEN),
    "KV heads by svd": lambda at: bh.KVHeadConversion(2, at=at, method="svd", **GIVEN),
}
PRECISIONS = {"bf16-mixed": 2, "bf16-true": 0, "16-true": 2}
"""All but 32-true, in which other fits are, each with the step of its events: in bfloat16 units are near ties after some."""


SETTINGS = {
    **{
        f"{precision}, {name}": shapes(partial(make, at), Descends, precision=precision)
        for precision, at in PRECISIONS.items()
        for name, make in CHANGES.items()
    },
    **{
        f"offloaded, {name}": shapes(partial(CHANGES[name], 2), offloaded)
        for name in ("channels by gradients", "heads", "KV heads by svd")
    },
    **{
        f"recomputed, {name}": shapes(partial(CHANGES[name], 2), lambda: Descends(checkpointed))
        for name in ("channels by gradients", "KV heads by svd")
    },
    "uneven last batches": shapes(
        lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **(SOME | {"calibration": 10})),
        lambda: Descends(rows=10, batch=4),
        max_epochs=-1,
    ),
}


def masked(precision):
    pruning = partial(bh.WeightPruning, bh.Wanda(), 0.5, at=2, calibration=3, measure_batches=1)
    return Fit(Descends, pruning, lambda one: [one.masks, one.events], options={"precision": precision})


MASKED = {f"wanda, {precision}": masked(precision) for precision in PRECISIONS}


def fit_all() -> None:
    """What each of two processes runs."""
    fit(SETTINGS | MASKED, 2)


def fit(fits, ranks) -> None:
    files, out, names = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name, one in fits.items():
        if name in names:
            run, *result = one.run(Path(out), files, ranks=ranks)
            keep(Path(out) / f"{name}.pt", result)
