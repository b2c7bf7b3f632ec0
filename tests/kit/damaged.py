"""Fits whose damage is told by one process, and by two under FSDP2."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import billhook as bh
from kit.families import llama
from kit.fits import trainer
from kit.sharding import Own, keep, sharding


class MadeLate(Own):
    """Whose model is sharded as soon as it is there, so that it writes as it is measured: in shards."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.blocks, self.policy, self.batch, self.nodes, self.sharded = True, MixedPrecisionPolicy(), 2, 1, {}

    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = llama().train()
        super().configure_model()


MODULES = {"whole at first": Own, "made late": MadeLate}


def told(folder, name, ranks=1):
    """What is told in a fit: after an event, and at the end, of three rows, which two ranks cannot share out evenly."""
    event = bh.KVHeadConversion(2, at=1, measure_batches=0)
    damage = bh.Damage(bh.Calibration(length=12, tokens=48), rows=3)
    options = {"devices": ranks, "strategy": sharding(ranks), "use_distributed_sampler": False} if ranks > 1 else {}
    run = trainer(folder, [event, damage], 3, limit_val_batches=0, **options)
    run.fit(MODULES[name]())
    return run, [event.events[0]["damage"], damage.last]


def fit_all():
    """What each of the two processes runs."""
    (out,) = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name in MODULES:
        run, found = told(Path(out), name, 2)
        keep(run, Path(out, f"{name}.pt"), found)
