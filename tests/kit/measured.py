"""Fits whose degradation is told, and in which a smaller model is searched for, by one process, and by two under FSDP2."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import billhook as bh
from billhook.engine.sharding import full_tensor
from billhook.fit.ranks import RanksDiffer
from billhook.importance.baselines import RandomUnits
from kit import shrinks
from kit.families import llama
from kit.fits import trainer
from kit.sent import sent_all
from kit.sharding import Own, keep, sharding


class MadeLate(Own):
    """Whose model is sharded as soon as it is there, so that it writes as it is measured: in shards."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.blocks, self.policy, self.batch, self.nodes, self.rows, self.sharded = True, MixedPrecisionPolicy(), 2, 1, 12, {}

    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = llama().train()
        super().configure_model()


MODULES = {"whole at first": Own, "made late": MadeLate}


SEARCHES = {"whole at first": {"params": 0.8, "at": 1}, "made late": {"params": 0.9, "layers": "free", "at": "start"}}


def fit(folder, name, ranks, callbacks):
    """Three steps."""
    options = {"devices": ranks, "strategy": sharding(ranks), "use_distributed_sampler": False} if ranks > 1 else {}
    run, lit = trainer(folder, callbacks, 3, limit_val_batches=0, **options), MODULES[name]()
    run.fit(lit)
    return run, {own: full_tensor(value) for own, value in lit.state_dict().items()}


def told(folder, name, ranks=1):
    """What is told in a fit: after an event, and at the end, of three rows, which two ranks cannot share out evenly."""
    event = bh.KVHeadConversion(2, at=1, measure_batches=0)
    degradation = bh.Degradation(bh.Calibration(length=12, tokens=48), examples=3)
    run, _ = fit(folder, name, ranks, [event, degradation])
    return run, [event.events[0]["degradation"], degradation.last]


def shrunk(folder, name, ranks=1):
    """What is found on batches of which every rank reads all, and the weights at the end."""
    given = [(one,) for one in torch.randint(3, 60, (5, 4, 12), generator=torch.Generator().manual_seed(1))]
    options = {"calibration": given, "generations": 1, "candidates": 2, "measure_batches": 0}
    callback = shrinks.Shrinking(**options, **SEARCHES[name])
    run, state = fit(folder, name, ranks, [callback])
    return run, [[event["what"] for event in callback.events], callback.shrunk.left, callback.shrunk.kept, state]


def differing(folder):
    """The error with which a search ends whose ranks score units otherwise."""
    score = RandomUnits(torch.distributed.get_rank())
    callback = shrinks.Shrinking(params=0.8, at=1, importance=score, generations=0, repair=None, calibration=6, measure_batches=0)
    with pytest.raises(RanksDiffer) as error:
        fit(folder, "whole at first", 2, [callback])
    return str(error.value)


def fit_all():
    """What each of the two processes runs."""
    (out,) = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name in MODULES:
        for what in (told, shrunk):
            run, found = what(Path(out), name, 2)
            keep(Path(out, f"{what.__name__}, {name}.pt"), found)
    sent_all(out)
    keep(Path(out, "differing.pt"), differing(out).partition(": ")[2])
