"""A fit with heads masked or removed that was stopped, at whatever step, goes on as if it had not been."""

import lightning.pytorch as pl
import pytest
import torch

import billhook as bh
from kit.fits import data, same, trainer, weights
from kit.head_pruning import REMOVE, Acting, acting, bare, module, pruning, scripted, silent
from kit.weight_pruning import checkpoints

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]
ROUNDS = bh.schedules.MultiStep([0.25, 0.5, 0.75], [2, 4, 6])
SEEN = [16] * 2 + [12] * 2 + [8] * 2 + [4] * 2


def same_record(one, other):
    assert repr(one.events) == repr(other.events)  # so that NaN is NaN
    assert one.heads == other.heads
    assert (one.record.first, one.record.numbers, one.record.curve) == (
        other.record.first, other.record.numbers, other.record.curve
    )  # fmt: skip
    assert one.record.scores.keys() == other.record.scores.keys()
    for name, scores in one.record.scores.items():
        torch.testing.assert_close(scores, other.record.scores[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.daily("rounds")
@pytest.mark.parametrize("remove", REMOVE)
def test_a_round_that_was_taken_back(files, tmp_path, remove):
    def callback():
        return pruning(ROUNDS, remove=remove, monitor="val_share", mode="max", keep=0.7, measure_batches=1)

    straight, whole, watch = scripted(), callback(), Acting()
    first = trainer(tmp_path, [whole, watch, checkpoints(tmp_path)])
    first.fit(straight, data(files))
    assert watch.seen == [16] * 2 + [12] * 6
    assert [event["step"] for event in whole.events] == [2, 4]
    assert whole.record.curve[0] == (0.0, 1.0)
    for stop in (3, 4):
        resumed, again, later = scripted(seed=1), callback(), Acting()
        run = trainer(tmp_path, [again, later])
        run.fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight)), stop
        assert later.seen == watch.seen[stop:]
        same_record(again, whole)
        assert all(map(same, run.optimizers[0].state.values(), first.optimizers[0].state.values()))
        assert bare(resumed)


def test_a_shorter_run_that_ended_goes_on_to_the_next_rounds(files, tmp_path):
    """Its weights that read masked heads are zero by then."""
    run = trainer(tmp_path, [pruning(bh.schedules.MultiStep([0.25], [2]), remove="never")], max_steps=4)
    run.fit(module(), data(files))
    run.save_checkpoint(tmp_path / "late.ckpt")
    lit, watch = module(1), Acting()
    trainer(tmp_path, [pruning(ROUNDS, remove="never"), watch]).fit(lit, data(files), ckpt_path=tmp_path / "late.ckpt")
    assert watch.seen == SEEN[4:]
    assert silent(lit) == 12


@pytest.mark.daily("validate-rounds")
@pytest.mark.parametrize(("stage", "remove"), [("validate", "never"), ("test", "end"), ("validate", "rounds")])
def test_outside_of_a_fit_a_checkpoint_computes_as_it_did(files, tmp_path, stage, remove):
    callback = pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 5]), remove=remove, measure_batches=None)
    lit = module()
    run = trainer(tmp_path, [callback, checkpoints(tmp_path)])
    run.fit(lit, data(files))
    events = {event["step"]: event for event in callback.events}
    fresh = trainer(tmp_path, [pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 5]), remove=remove)])
    given = data(files | {"test": files["validation"]})
    for one, subject, step, heads in ((run, lit, 2, 12), (fresh, module(1), 5, 8), (run, lit, 1, 16), (run, lit, 8, 8)):
        watch = Watch()
        one.callbacks.append(watch)
        said = getattr(one, stage)(subject, given, ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)[0]
        one.callbacks.remove(watch)
        assert watch.seen == [heads]
        assert bare(subject)
        if step in events:
            found = said["val_loss" if stage == "validate" else "test_loss"]
            assert found == pytest.approx(events[step]["after"]["val_loss"], rel=1e-5)


class Watch(pl.Callback):
    """How many heads act in a validation or test."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen = [acting(pl_module)]

    on_test_batch_start = on_validation_batch_start
