"""Fits of several callbacks that can be stopped and resumed."""

import random

import lightning.pytorch as pl
import numpy as np
import torch

import billhook as bh
from billhook import HeadPruning, KVHeadConversion
from kit import prunes
from kit.families import llama

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}


FEW = {"measure_batches": 0, "calibration": 4}


TWICE = {"heads": bh.schedules.MultiStep([0.25, 0.5], [1, 2]), "late": bh.schedules.MultiStep([0.25, 0.5], [5, 6])}


def module(seed=0, lora=False, **options):
    torch.manual_seed(seed)
    model = llama(vocab_size=2048, attention_dropout=0.2, **SIZES)
    return bh.TransformerModule(
        model, lr=1e-2, **{"warmup": 2, "lora": bh.training.LoRA(r=2, dropout=0.2) if lora else None, **options}
    )


def heads_then_kv_heads_then_weights(folder):
    return [
        HeadPruning(TWICE["heads"], **FEW),
        KVHeadConversion(1, at=4, measure_batches=0),
        prunes.WeightPruning(bh.Wanda(), TWICE["late"], **FEW),
    ]


class Own(pl.LightningModule):
    """A module of a user's own that draws random numbers of every kind, and a loader that does not know its place."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = llama(attention_dropout=0.2, **SIZES).train()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(batch["labels"][:, 0].tolist()))
        scale = 1 + random.random() + np.random.random()
        return scale * self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def rows(count):
    torch.manual_seed(3)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (count, 6))]


class Seed(pl.Callback):
    """The same random numbers in each process, however many have been drawn in it."""

    def on_train_start(self, *_):
        torch.manual_seed(0)
