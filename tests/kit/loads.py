"""How much memory it takes to resume a fit under FSDP2, by the bytes of live tensors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

import billhook as bh
from billhook.engine.sharding import local
from kit.beside import kept, model, size
from kit.fits import trainer
from kit.held import Held
from kit.sharding import Own, sharding

SAVED = {"full": False, "sharded": True}
"""Kinds of checkpoints, each with what the strategy is told."""


def loaded(folder, kind, strategies, ranks=1):
    """Bytes that a rank takes at most while it resumes, beside what the fit then has: found, of its gradients, of a tensor."""
    found, load = [], ModelParallelStrategy.load_checkpoint

    def measured(strategy, checkpoint_path, weights_only=None):
        optimizers = strategy.optimizers
        with Held(kept(lit, run), but=checkpoint_path) as held:
            before = held.now()
            read = load(strategy, checkpoint_path, weights_only=weights_only)
        states = size(
            map(local, (one for optimizer in optimizers for state in optimizer.state.values() for one in state.values()))
        )
        found.append(held.most - before - states)
        return read

    saves = ModelCheckpoint(folder, f"{kind}-{{step}}", every_n_train_steps=2)
    options = {"devices": ranks, "use_distributed_sampler": False} if ranks > 1 else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelParallelStrategy, "load_checkpoint", measured)
        for path, steps, callbacks in ((None, 2, [saves]), (Path(folder, f"{kind}-step=2.ckpt"), 3, [])):
            lit, callbacks = Own(model), [bh.KVHeadConversion(2, at=1, measure_batches=0), *callbacks]
            run = trainer(folder, callbacks, steps, strategy=next(strategies), limit_val_batches=0, **options)
            run.fit(lit, ckpt_path=path)
    assert lit.net.config.num_key_value_heads == 2
    (most,) = found
    return most, size(map(local, lit.parameters())), max(size([own]) for own in lit.parameters())


def load_all():
    """What each of two processes runs, after other fits."""
    _, out, names = json.loads(sys.argv[1])
    for kind in (kind for kind in SAVED if kind in names):
        strategies = (sharding(2, save_distributed_checkpoint=SAVED[kind]) for _ in range(2))
        own, gathered = loaded(out, kind, strategies, ranks=2), [None, None]
        torch.distributed.all_gather_object(gathered, own)
        torch.save([True, gathered], Path(out, f"{kind}, loaded.pt"))
