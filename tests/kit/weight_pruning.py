"""Fits that prune weights."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.model.linears import prunable
from kit import fits

FEW = {"examples": 6, "measure_batches": 0}


def module(seed=0):
    return fits.module(seed, intermediate_size=32)  # every linear has 32 inputs


def pruning(*args, **options):
    return bh.WeightPruning(*args, **FEW | options)


def zeros(pl_module):
    """The smallest and the largest share of zeros of a linear."""
    shares = [(linear.weight == 0).float().mean().item() for linear in prunable(pl_module.model).values()]
    return round(min(shares), 4), round(max(shares), 4)


class Zeros(pl.Callback):
    """The share of zeros at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert zeros(pl_module)[0] == zeros(pl_module)[1]
        self.seen.append(zeros(pl_module)[0])


def checkpoints(folder, **options):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", **options)


RAMP = bh.schedules.Cubic(final=0.5, start=1, end=7, every=2)


ROUNDS = [0, 0, 0, 0.3438, 0.3438, 0.4688, 0.4688, 0.5]  # int(32 * sparsity) / 32
