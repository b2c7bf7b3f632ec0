"""Fits of two forked ranks, of which one fails or works alone while the other waits."""

import json
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

import billhook as bh
from billhook.callbacks import export
from billhook.kv_heads.plan import KVHeadPlan
from billhook.pruning.block_plan import BlockPlan
from kit import prunes
from kit.fits import trainer
from kit.forked import forked_ranks
from kit.ranks import FitOfTuples
from kit.sharding import Own, sharding

SCRIPT = "from kit.alone import run_all\nrun_all()\n"
FEW = {"at": 1, "calibration": 4, "measure_batches": 0}
PATIENCE = 3
"""How many seconds a rank waits in a collective, where another works longer than that."""

FAILING = {
    "KV heads": (lambda: bh.KVHeadConversion(2, method="svd", **FEW), KVHeadPlan, "apply", 1),
    "weights": (lambda: prunes.WeightPruning(bh.SparseGPT(), sparsity=0.5, **FEW), bh.SparseGPT, "prune", 1),
    "depth": (lambda: bh.DepthPruning(1, **FEW), BlockPlan, "apply", 0),
}
"""Events under FSDP2, each with what fails in it on which rank; the other gathers blocks meanwhile."""


def fails(*_, **__):
    raise RuntimeError("this rank has no memory left")


def rank():
    return torch.distributed.get_rank()


class Ready(pl.Callback):
    """Has something fail on a rank once ranks know their numbers."""

    def __init__(self, owner, method, number):
        self.owner, self.method, self.number = owner, method, number

    def on_train_start(self, *_):
        if rank() == self.number:
            setattr(self.owner, self.method, fails)


def failing(name, folder):
    make, *what = FAILING[name]
    run = trainer(folder, [Ready(*what), make()], 2, devices=2, strategy=sharding(2), limit_val_batches=0)
    run.fit(Own())


def slowly(original, *given, **options):
    time.sleep(PATIENCE + 1)
    return original(*given, **options)


def exporting(folder):
    """What the first rank does alone takes longer than a collective waits."""
    for name in ("save", "push"):
        setattr(export, name, partial(slowly, getattr(export, name) if name == "save" else lambda *_: "there"))
    export.check_token = lambda *_: None
    callbacks = [bh.Export(str(folder / "model"), rehearse=False, push_to_hub="user/name")]
    strategy = DDPStrategy(timeout=timedelta(seconds=PATIENCE))
    run = trainer(folder, callbacks, 1, devices=2, strategy=strategy, use_distributed_sampler=False, limit_val_batches=0)
    run.fit(FitOfTuples())
    torch.distributed.barrier()
    print(f"rank {run.global_rank} has gone on")


def run_all():
    """Forks the ranks of each fit, one fit after the other."""
    folder = Path(json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    what = {name: partial(failing, name) for name in FAILING} | {"export": exporting}
    ended = {}
    for name, one in what.items():
        (own := folder / name).mkdir()
        ended[name] = forked_ranks(one, 2, lambda number, own=own: own / f"{number}.log", own)
    (folder / "ended.json").write_text(json.dumps(ended))
