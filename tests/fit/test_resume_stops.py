"""Runs that are stopped by a signal or an error, and go on from what they had saved."""

import os
import random
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

import billhook as bh
from kit.fits import data, same, trainer, weights
from kit.resumable import Own, Seed, heads_then_kv_heads_then_weights, module, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    # with OnExceptionCheckpoint each fit goes on with the last checkpoint, if there is one
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    folder, lit = tmp_path_factory.mktemp("straight"), module()
    trainer(folder, [*heads_then_kv_heads_then_weights(folder), Seed()]).fit(lit, data(files))
    return weights(lit)


class Interrupt(pl.Callback):
    """Sends a signal, or fails, after so many batches."""

    def __init__(self, batch, what):
        self.batch, self.what = batch, what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch and self.what == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch and self.what != signal.SIGTERM:
            raise self.what


@pytest.mark.daily("4-15", "3-what3")
@pytest.mark.parametrize(
    ("batch", "what"),
    [(1, signal.SIGTERM), (4, signal.SIGTERM), (5, signal.SIGTERM), (3, KeyError("three")), (6, KeyboardInterrupt())],
)
def test_stopped_in_the_middle(files, tmp_path, straight, batch, what):
    """What OnExceptionCheckpoint saves resumes: at the end of the batch by SIGTERM, with the same batch after an error."""
    saver = OnExceptionCheckpoint(tmp_path)
    run = trainer(
        tmp_path, [*heads_then_kv_heads_then_weights(tmp_path), Interrupt(batch, what), Seed(), saver], enable_checkpointing=True
    )
    with pytest.raises((SystemExit, KeyError)):
        run.fit(module(), data(files))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == (batch if what == signal.SIGTERM else batch - 1)
    resumed = module(seed=1)
    trainer(tmp_path, heads_then_kv_heads_then_weights(tmp_path)).fit(
        resumed, data(files), ckpt_path=tmp_path / "on_exception.ckpt"
    )
    assert same(weights(resumed), straight)


@pytest.mark.daily("5")
@pytest.mark.parametrize("batch", [3, 5, 8])
def test_stopped_before_all_gradients_of_a_step_are_there(files, tmp_path, batch):
    """Those that are there are kept; at the end of a step there are none to keep."""
    lits, callbacks = [module(), module(), module(seed=1)], lambda: heads_then_kv_heads_then_weights(tmp_path)
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}
    trainer(tmp_path, [*callbacks(), Seed()], **options).fit(lits[0], data(files))
    run = trainer(
        tmp_path, [*callbacks(), Seed(), Interrupt(batch, signal.SIGTERM), OnExceptionCheckpoint(tmp_path)],
        enable_checkpointing=True, **options,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        run.fit(lits[1], data(files))
    path = tmp_path / "on_exception.ckpt"
    assert ("billhook_gradients" in torch.load(path, weights_only=True)) == (batch % 4 > 0)
    trainer(tmp_path, callbacks(), **options).fit(lits[2], data(files), ckpt_path=path)
    assert same(weights(lits[2]), weights(lits[0]))


def test_a_module_and_a_loader_of_ones_own(tmp_path):
    """Stopped by a signal in the middle of the second epoch, and what resumed it in the third."""

    def run(seed, path, *more):
        lit, loader, held_out = Own(seed), DataLoader(rows(8), 2, shuffle=True), DataLoader(rows(2))
        one = trainer(
            tmp_path,
            [bh.WeightPruning(bh.Magnitude(), 0.5, at=1), *more],
            max_steps=-1,
            max_epochs=3,
            enable_checkpointing=bool(more),
        )
        for draw in (torch.manual_seed, random.seed, np.random.seed):
            draw(seed)
        if more:
            with pytest.raises(SystemExit):
                one.fit(lit, loader, held_out, ckpt_path=path)
        else:
            one.fit(lit, loader, held_out, ckpt_path=path)
        return lit

    straight, path = run(0, None), None
    for seed, batch in enumerate((6, 7, 9)):
        run(seed, path, Interrupt(batch, signal.SIGTERM), OnExceptionCheckpoint(tmp_path, str(batch)))
        path = tmp_path / f"{batch}.ckpt"
    resumed = run(5, path)
    assert resumed.seen == straight.seen[9:]
    assert same(weights(resumed), weights(straight))
