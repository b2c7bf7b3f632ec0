"""Fits that two processes do as one does, and those of which one decides otherwise, fails, or goes on where the other ended."""

import errno
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import billhook as bh
from billhook import DepthPruning, Export, HeadPruning, KVHeadConversion, RepairConfig, StructuredPruning, Taylor
from billhook.importance.baselines import RandomUnits
from billhook.schedules import Linear, MultiStep
from kit import prunes, shrinks
from kit.families import llama
from kit.fits import module
from kit.ranks import Fit, FitOfTuples, draw, fit_all

SCRIPT = """
import os
os.environ["PYTHONHASHSEED"] = "4"  # the second's; the first has 3: as any user's, they do not order sets of strings alike
from kit.ddp import fit_two
fit_two()
"""


def conversion():
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 4}
    return Fit(module, lambda: KVHeadConversion([2, 1], [2, 4]), lambda one: one.events, options)


def weight_pruning(calibration=7, match=None):
    ramp = Linear(final=0.5, start=1, end=5, every=2)
    return Fit(
        module,
        lambda: prunes.WeightPruning(sparsity=ramp, match=match, calibration=calibration, measure_batches=2),
        lambda one: [one.masks, one.events],
        {"accumulate_grad_batches": 2},
    )


def head_pruning():
    """On ten examples of the training data."""
    return Fit(
        lambda: FitOfTuples(8),
        lambda: HeadPruning(MultiStep([0.25, 0.5], [2, 4]), remove="rounds", measure_batches=0, calibration=10),
        lambda one: [vars(one.record), one.heads, one.events],
    )


def structured_pruning():
    """In two events, on batches of the user's own, of which the same choose the ridge."""
    options = {"importance": Taylor("first"), "repair": RepairConfig(), "measure_batches": 0}
    options["calibration"] = [(ids,) for ids in draw(8, 4, 12, seed=1)]
    return Fit(
        FitOfTuples,
        lambda: StructuredPruning(bh.Amount(channels=0.5, kv_heads=0.5), MultiStep([0.5, 1.0], [2, 4]), **options),
        lambda one: one.events,
    )


def experts():
    """A mixture loses experts, then channels of experts, and is repaired."""
    options = {"repair": RepairConfig(), "measure_batches": 0, "calibration": [(ids,) for ids in draw(8, 4, 12, seed=1)]}
    amounts = bh.Amount(experts=0.25), bh.Amount(channels=0.25)
    return Fit(
        partial(FitOfTuples, family="qwen3_moe"),
        lambda: [StructuredPruning(amount, at=2 * number + 2, **options) for number, amount in enumerate(amounts)],
        lambda both: [one.events for one in both],
    )


def polished():
    """Weights become zero, and the others are polished."""
    options = {"calibration": [(ids,) for ids in draw(8, 4, 12, seed=1)], "measure_batches": 0}
    polish = bh.PolishConfig(steps=4, trains="all")
    return Fit(
        FitOfTuples, lambda: bh.WeightPruning(sparsity=0.5, at=2, polish=polish, **options), lambda one: told([one]), steps=4
    )


def shrinking():
    """On batches of the user's own, of which every process reads all."""
    options = {"at": 2, "calibration": [(one,) for one in draw(5, 4, 12, seed=1)], "generations": 2, "candidates": 3}
    return Fit(
        FitOfTuples,
        lambda: shrinks.Shrinking(params=0.9, layers="free", measure_batches=0, **options),
        lambda one: [one.events, one.shrunk.kept],
        steps=4,
    )


def with_own_batches(at, heads=2, **options):
    """On batches of the user's own, two to a process."""
    given = {"calibration": [(one,) for one in draw(4, 2, 12, seed=1)], "measure_batches": 0}
    return Fit(FitOfTuples, lambda: KVHeadConversion(heads, at, **given | options), lambda one: one.events, steps=4)


def degraded():
    """Each process reads its rows."""
    return Fit(
        FitOfTuples,
        lambda: [KVHeadConversion(2, at=1, **NONE), bh.Degradation(bh.Calibration(length=12, tokens=48), examples=3)],
        lambda both: [both[0].events[0]["degradation"], both[1].last],
        steps=2,
    )


def written():
    """Each process writes a share of the texts."""
    text = bh.Calibration(length=16, tokens=64)
    return Fit(
        partial(module, num_attention_heads=4),
        lambda: [KVHeadConversion(2, at=1, **NONE), bh.Degradation(text, examples=3, prompts=3)],
        lambda both: [both[0].events[0]["written"], both[1].written],
        steps=2,
    )


FITS = {
    "convert in stages": conversion(),
    "weights, text": weight_pruning(),
    "weights, matched": weight_pruning(8, bh.criteria.BlockMatching()),  # as many examples as make batches of equal parts
    "heads in rounds": head_pruning(),
    "structure": structured_pruning(),
    "experts": experts(),
    "polish": polished(),
    "shrink": shrinking(),
    "KV heads in stages": with_own_batches([1, 3], heads=[2, 1], method="svd"),
    "degradation": degraded(),
    "written": written(),
}


def batches(number):
    return [(one,) for one in draw(number, 2, 12, seed=1)]


def each(number, **options):
    """All callbacks, one after the other, each on so many batches."""
    given = {"calibration": batches(number), "measure_batches": 0}
    return Fit(
        lambda: FitOfTuples(**options),
        lambda: [
            DepthPruning(1, at=1, **given),
            KVHeadConversion(2, at=2, method="aligned", **given),
            HeadPruning(0.5, at=3, options=bh.HeadOptions(per="kv_head"), importance=bh.Taylor(), **given),
            StructuredPruning(bh.Amount(channels=0.25), at=4, **given),
            prunes.WeightPruning(sparsity=0.5, at=5, **given),
        ],
        told,
        {"accumulate_grad_batches": 2},
    )


class Hooked(DDPStrategy):
    """Lightning registers hooks on GPUs only."""

    def _register_ddp_hooks(self):
        self.model.register_comm_hook(None, fp16_compress_hook)


def told(callbacks):
    return [(event["step"], event["what"]) for one in callbacks if hasattr(one, "events") for event in one.events]


def converted(strategy):
    return Fit(FitOfTuples, lambda: [KVHeadConversion(1, at=2, measure_batches=0)], told, {}, 4, strategy)


UNEQUAL = {
    "three batches": each(3, examples=9),
    "one batch": each(1, examples=9, drop_last=True),
    "static graph": converted(lambda: DDPStrategy(static_graph=True)),
    "half precision": converted(Hooked),
}


class OfRank(bh.Magnitude):
    """What each rank makes of its own."""

    def score(self, weight, statistics=None):
        return super().score(weight, statistics).roll(rank(), 1)


class Apart(pl.Callback):
    """The weights of the second rank become others."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.net.model.layers[0].self_attn.v_proj.weight += 0.1 * rank()


class Drift(pl.Callback):
    """The weights of the second rank are rounded otherwise, until its model is changed."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if rank() and trainer.global_step == 1:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for own in pl_module.parameters():
                    own *= 1 + 1e-7 * torch.randn(own.shape, generator=generator)


def drifting(one):
    return replace(one, callback=lambda: [Drift(), one.callback()], told=lambda both: one.told(both[1]), strategy=lambda: "ddp")


def scored_apart(make):
    """Scores of which each rank has others, of which the first one's count."""
    return Fit(FitOfTuples, lambda: make(RandomUnits(rank())), lambda one: [event["what"] for event in one.events])


class Validated(FitOfTuples):
    """Logs what is not summed over ranks: on the second it becomes worse each time. Or fails there."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails, self.own, self.times = fails, MeanMetric(sync_on_compute=False), 0

    def val_dataloader(self):
        return DataLoader(TensorDataset(draw(2, 12)))

    def validation_step(self, batch, batch_idx):
        if self.fails and rank():
            raise ValueError("no such file")
        self.times += 1
        self.own.update(1 - rank() * self.times)
        self.log("own", self.own)


class Full(Export):
    def _export(self, fit, model, failed):
        failed.append(OSError(errno.ENOSPC, "No space left on device"))


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def stray():
    """Batches of which the second rank's has a token that is in no vocabulary."""
    return {"calibration": [(one,) for one in draw(2, 2, 12) + torch.tensor([0, 99])[:, None, None]], "measure_batches": 0}


def of_rank():
    """Batches that all ranks are to read, of which the second rank has others."""
    return [(one,) for one in draw(4, 2, 12, seed=rank())]


def stop(callback, module=FitOfTuples):
    return Fit(module, callback, told, {"limit_val_batches": 0}, 3)


NONE = {"measure_batches": 0}


DRIFTING = {
    "drifting, shrink": drifting(shrinking()),
    "drifting, svd": drifting(with_own_batches(2, method="svd")),
    "drifting, structure scored apart": scored_apart(
        lambda score: StructuredPruning(bh.Amount(channels=0.5), at=2, importance=score, measure_batches=0)
    ),
}
"""Fits that end alike on ranks whose weights are rounded otherwise, or that score otherwise."""


DIFFER = {
    "WeightPruning: the masks": stop(lambda: [prunes.WeightPruning(OfRank(), sparsity=0.5, at=1, **NONE)]),
    "KVHeadConversion: the pooled heads": stop(lambda: [Apart(), KVHeadConversion(2, at=1, **NONE)]),
    "StructuredPruning: the plan": stop(
        lambda: [StructuredPruning(bh.Amount(channels=0.5 - rank() / 4), at=1, importance=RandomUnits(), **NONE)]
    ),
    "Shrinking: the batches": stop(lambda: [shrinks.Shrinking(params=0.8, at=1, calibration=of_rank(), **NONE)]),
    "HeadPruning: whether monitor='own' is worse": replace(
        stop(lambda: [HeadPruning(0.5, 1, bh.importance.WeightNorm(), stop=bh.StopWhenWorse("own", mode="max"))], Validated),
        options={},
    ),
}


FAIL = {
    "structure fails": stop(lambda: [StructuredPruning(bh.Amount(channels=0.5), at=1, **stray())]),
    "validation fails": replace(stop(lambda: [KVHeadConversion(2, at=1)], partial(Validated, fails=True)), options={}),
    "export fails": stop(lambda: [Full("unused")]),
}


def taught_apart():
    torch.manual_seed(rank())
    return bh.TransformerModule(llama(vocab_size=2048), distillation=bh.training.Distillation())


TEACHERS = {"teachers": Fit(taught_apart, lambda: [KVHeadConversion(2, at=1, **NONE)], told, {"limit_val_batches": 0}, 3)}


RESUMED = {
    "conversion goes on": Fit(
        partial(FitOfTuples, examples=8),
        lambda: [KVHeadConversion(2, 1, **NONE), prunes.WeightPruning(bh.Magnitude(), MultiStep([0.3, 0.6], [2, 6]), **NONE)],
        lambda both: [both[0].events, both[1].events, both[1].masks],
        steps=8,
    ),
    "heads go on": Fit(
        partial(FitOfTuples, examples=8),
        lambda: [HeadPruning(MultiStep([0.25, 0.5], [2, 6]), remove="rounds", calibration=batches(2), **NONE)],
        lambda all_: [all_[0].events, all_[0].record.numbers],
        steps=8,
    ),
}


class Keep(pl.Callback):
    """Keeps a checkpoint of the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if not trainer.current_epoch:
            trainer.save_checkpoint(self.path)


def kept(name, folder):
    keep, export = partial(Keep, folder / f"{name}.ckpt"), partial(Export, str(folder / name))
    return replace(RESUMED[name], callback=lambda: [*RESUMED[name].callback(), keep(), export()])


def resumed(name, folder):
    return replace(RESUMED[name], resumed=folder / f"{name}.ckpt")


def fit_two():
    """In each of two processes."""
    fit_all(FITS | UNEQUAL | DRIFTING)
    (files, out, names), stopped = json.loads(sys.argv[1]), {}
    for name, one in (DIFFER | FAIL | TEACHERS).items():
        if name not in names:
            continue
        callbacks = one.callback()
        with pytest.raises(Exception) as caught:  # noqa: PT011 - what it says is looked at later
            replace(one, callback=lambda own=callbacks: own).run(Path(out), files, ranks=2)
        stopped[name] = [None, None]
        own = [type(caught.value).__name__, str(caught.value), told(callbacks)]
        torch.distributed.all_gather_object(stopped[name], own)
    Path(out, "stopped.json").write_text(json.dumps(stopped))
    for name in (name for name in RESUMED if name in names):
        kept(name, Path(out, "two")).run(Path(out), files, ranks=2)
    fit_all({name: resumed(name, Path(out, "one")) for name in RESUMED})
