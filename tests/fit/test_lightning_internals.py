"""Each private name of Lightning that is used still exists, and is what it was."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner

from billhook.fit import lightning_internals as internals
from kit.events import Own, loader
from kit.fits import trainer


class Reads(pl.Callback):
    """All of them in the middle of an optimizer step, of two batches, in the second of two epochs."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            (own,) = internals.training_loaders(trainer)
            assert own is trainer.train_dataloader
            fetcher = internals.data_fetcher(trainer)
            assert fetcher.length == 4
            assert next(fetcher.iterator)[1] == 1
            iter(fetcher)
            assert next(fetcher.iterator)[1] == 0
            progress = internals.batch_progress(trainer)
            assert (progress.current.ready, progress.total.ready, progress.is_last_batch) == (1, 5, False)
            assert internals.is_accumulating(trainer)
            assert not internals.is_sequential(trainer.fit_loop._combined_loader)
            loaders = internals.validation_loaders(trainer)
            assert internals.is_sequential(loaders)
            assert loaders.flattened == [trainer.val_dataloaders]
            moved = internals.to_device(trainer, next(iter(loader())))
            assert moved["input_ids"].shape == (2, 6)
            assert [(type(callback), copy is not None) for callback, copy in internals.averaging_callbacks(trainer)] == [
                (WeightAveraging, True)
            ]
            assert not internals.is_tuning(trainer)
            self.read = True


def test_in_a_fit(tmp_path):
    reads, keep = Reads(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    run = trainer(tmp_path, [reads, WeightAveraging(), keep], max_steps=4, accumulate_grad_batches=2)
    assert internals.training_loaders(run) == []
    run.fit(Own(), loader(), loader(4, 4))
    assert reads.read
    assert run.global_step == 4
    assert internals.saved_progress(torch.load(tmp_path / "step=3.ckpt", weights_only=True))["processed"] == 2
    internals.drop_training_loaders(run)
    assert internals.training_loaders(run) == []


def test_a_search_is_known(tmp_path):
    class Asks(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            searches.append(internals.is_tuning(trainer))

    searches = []
    run, lit = trainer(tmp_path, [Asks()], 1), Own()
    Tuner(run).lr_find(lit, loader(), loader(4, 4), num_training=3, update_attr=False)
    run.fit(lit, loader(), loader(4, 4))
    assert searches == [True, False]


@pytest.mark.parametrize("start", ["popen", "fork"])
def test_how_processes_start(start):
    run = pl.Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method=start), logger=False)
    assert internals.forks_or_spawns(run) == (start == "fork")
    assert internals.communication_state(run) is None
    run.strategy._ddp_comm_state = "state"
    assert internals.communication_state(run) == "state"
    assert hasattr(DDPStrategy(), "_ddp_comm_state")
