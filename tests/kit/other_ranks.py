"""Fits under FSDP2 whose shapes change, saved by two ranks and resumed by four, and the other way round."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.engine.sharding import full_tensor
from billhook.fit.lightning import LightningFit
from billhook.fit.ranks import check_identical
from kit.fits import data, module, trainer
from kit.sharding import sharding

FEW = {"calibration": 6, "measure_batches": 0}


def masked(one: Callable[[], Any]) -> Callable[[], list[Any]]:
    """Masks that hold from before the shapes change."""
    return lambda: [bh.WeightPruning(bh.Magnitude(), 0.5, at=1, measure_batches=0), one()]


CALLBACKS = {
    "channels": masked(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=3, repair=None, **FEW)),
    "KV heads": masked(lambda: bh.KVHeadConversion([4, 2], at=["start", 3])),
}
SAVED = {(2, "channels"): True, (2, "KV heads"): False, (4, "channels"): False, (4, "KV heads"): True}
"""What so many ranks save, each with whether in full checkpoints."""
RESUMED = [*((*fit, 4) for fit in SAVED), (2, "KV heads", 2), (4, "channels", 2)]
"""What others go on with: after which step, the last before shapes change or the first one since."""


class Kept(pl.Callback):
    """Keeps the weights, and what the optimizer has of them, as they are after each step and before the first."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {own: name for name, own in pl_module.named_parameters()}
        held = {name: full_tensor(own) for own, name in names.items()}
        for optimizer in trainer.optimizers:
            assert [*optimizer.state] == [] or {*optimizer.state} == {*names}
            for own, state in optimizer.state.items():
                held |= {f"{names[own]} {key}": full_tensor(value) for key, value in state.items()}
        self.at[trainer.global_step] = {name: value.clone() for name, value in held.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.on_train_start(trainer, pl_module)


@dataclass(frozen=True)
class Run:
    """A fit by some ranks, from a checkpoint if there is one."""

    files: dict[str, str]
    out: Path
    ranks: int

    def fit(self, name: str, what: str, full: bool, path: Path | None = None) -> None:
        torch.manual_seed(0)
        given, kept, saves = CALLBACKS[what](), Kept(), []
        if path is None:
            saves = [ModelCheckpoint(self.out / name, "{step}", every_n_train_steps=2, save_top_k=-1)]
        strategy = sharding(self.ranks, save_distributed_checkpoint=not full)
        callbacks = [*given, kept, *saves]
        run = trainer(self.out, callbacks, 5, devices=self.ranks, strategy=strategy, limit_val_batches=0)
        run.fit(module(), data(self.files, batch_size=4 // self.ranks), ckpt_path=path)
        result = [kept.at, given[0].masks, given[1].events]
        check_identical(LightningFit(run, run.lightning_module), "the test", "what came of the fit", result)
        if run.is_global_zero:
            torch.save(result, self.out / f"{name}.pt")

    def save_all(self) -> None:
        for (ranks, what), full in SAVED.items():
            if ranks == self.ranks:
                self.fit(f"{ranks} {what}", what, full)

    def resume_all(self) -> None:
        for ranks, what, step in RESUMED:
            if ranks != self.ranks:
                name = f"{ranks} {what}"
                self.fit(f"{name}, {step}", what, SAVED[ranks, what], self.out / name / f"step={step}.ckpt")


def _rank(rank: int, ranks: int, saves: bool, resumes: bool) -> None:
    files, out = json.loads(sys.argv[1])
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    run = Run(files, Path(out), ranks)
    if saves:
        run.save_all()
    if resumes:
        run.resume_all()


def fit_all() -> None:
    """Forks two ranks, then four, then two again: what they need has been imported once."""
    for ranks, saves, resumes in ((2, True, False), (4, True, True), (2, False, True)):
        torch.multiprocessing.start_processes(_rank, (ranks, saves, resumes), nprocs=ranks, start_method="fork")
