"""A fit that is killed, by itself: run as a script with what is to happen, a folder, the text files and how many threads."""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint

from kit.fits import data, trainer
from kit.resumable import heads_then_kv_heads_then_weights, module

STEPS = 8


def fit(folder, files, ckpt_path=None, seed=0, more=(), max_steps=STEPS):
    lit = module(seed)
    keep = ModelCheckpoint(
        folder / "kept", filename="{step}", every_n_train_steps=2, save_top_k=2, monitor="step", mode="max", save_last=True
    )
    trainer(folder, [*heads_then_kv_heads_then_weights(folder), keep, Seed(), *more], max_steps=max_steps).fit(
        lit, data(files), ckpt_path=ckpt_path
    )
    return lit


class Seed(pl.Callback):
    """The same random numbers in each process, however many have been drawn in it."""

    def on_train_start(self, *_):
        torch.manual_seed(0)


class Kill(pl.Callback):
    """In the middle of a step, after the forward."""

    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing():
    """In the middle of the sixth file, which is to be the third `last.ckpt`."""
    write, count = LocalFileOpener.write, [0]

    def half(self, content):
        count[0] += 1
        written = write(self, content if count[0] < 6 else bytes(content)[: len(content) // 2])
        if count[0] == 6:
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    LocalFileOpener.write = half


if __name__ == "__main__":
    how, where, files, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if how == "writing":
        kill_while_writing()
    fit(Path(where), json.loads(files), more=[Kill()] if how == "step" else [])
