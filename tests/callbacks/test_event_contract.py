"""The contract of every callback that changes a model in a fit; a new one is held to it by an entry in `kit.events.EVENTS`.

Modules of a user's own, also with manual optimization, are in `tests/fit/test_lightning_user_modules.py`, number formats in
`tests/fit/test_lightning_precision.py`, other features of a Trainer in `tests/fit/test_lightning_features.py`.
"""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from kit.events import END, EVENTS, Own, figures, fit, loader, other
from kit.fits import same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.parametrize("event", EVENTS),
]


def each_step(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


def state(run):
    return [value for optimizer in run.optimizers for own in optimizer.state.values() for value in own.values()]


def test_resumed_equals_straight_through(tmp_path, event):
    """Stopped before the event, right at it, and after it; a callback that is used again forgets the fit before."""
    lit, straight, _ = fit(tmp_path, event, more=[each_step(tmp_path)])
    used = EVENTS[event](2)
    for stop in (1, 2, 3):
        resumed, run = other(), trainer(tmp_path, [used], max_steps=4)
        run.fit(resumed, loader(), loader(4, 4), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(lit)), stop
        assert repr(used.events) == repr(straight.events)
        saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        kept = [value for own in saved.values() for value in own.values()]
        assert all(torch.equal(left, right) for left, right in zip(state(run), kept, strict=True))


@pytest.mark.daily("wanda", "structure", "mean")
def test_a_second_fit_starts_again_and_a_fit_that_goes_on_goes_on(tmp_path, event):
    callback, fits = EVENTS[event](2), []
    for _ in range(2):
        lit, run = Own(), trainer(tmp_path, [callback], max_steps=-1, max_epochs=1)
        run.fit(lit, loader(), loader(4, 4))
        fits.append(weights(lit))
        assert [one["step"] for one in callback.events] == [2]
    assert same(*fits)
    run.fit_loop.max_epochs = 2
    run.fit(lit, loader(), loader(4, 4))
    assert [one["step"] for one in callback.events] == [2]
    assert figures(lit)[:4] == END[event][:4]
    assert run.global_step == 8


@pytest.mark.daily("wanda", "structure")
def test_a_checkpoint_of_a_run_without_it_is_changed_when_training_goes_on(tmp_path, event):
    trainer(tmp_path, [each_step(tmp_path)], max_steps=3).fit(Own(), loader(), loader(4, 4))
    for at in ("start", 2):
        lit, callback = other(), EVENTS[event](at)
        trainer(tmp_path, [callback], max_steps=4).fit(lit, loader(), loader(4, 4), ckpt_path=tmp_path / "step=3.ckpt")
        assert [one["step"] for one in callback.events] == [3]
        assert figures(lit) == END[event]


def test_training_that_ends_early_says_what_it_left_out(tmp_path, event):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 1

    callback = EVENTS[event](3)
    with pytest.warns(UserWarning, match=f"{type(callback).__name__}: training ended at step 1, before the event at step 3"):
        trainer(tmp_path, [callback, Stop()], max_steps=4).fit(Own(), loader(), loader(4, 4))
    assert callback.events == []


@pytest.mark.daily("wanda", "shrink")
def test_fast_dev_run_tries_what_comes_later(tmp_path, event):
    lit, callback = Own(), EVENTS[event](90)
    trainer(tmp_path, [callback], max_steps=-1, fast_dev_run=True).fit(lit, loader(), loader(4, 4))
    assert figures(lit) == END[event]
    assert [one["step"] for one in callback.events] == [1]


class Memory(Logger):
    """A logger that somebody has written for himself."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows, self.steps = {}, []

    def log_metrics(self, metrics, step=None):
        self.steps.append(step)
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params, *_, **__):
        pass


@pytest.mark.daily("wanda", "structure")
def test_each_logger_gets_the_figures(tmp_path, event):
    loggers = [CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b"), Memory()]
    _, callback, _ = fit(tmp_path, event, logger=loggers, log_every_n_steps=1)
    before, after = callback.events[0]["before"], callback.events[0]["after"]
    for logger in loggers[:2]:
        with open(f"{logger.log_dir}/metrics.csv") as file:
            row = next(row for row in csv.DictReader(file) if row["val_loss_after"])
        assert (int(row["step"]), int(row["epoch"]), float(row["params"])) == (1, 0, after["params"])
        assert float(row["val_loss_after"]) == after["val_loss"]
    assert loggers[2].rows[1]["val_loss_before"] == before["val_loss"] != after["val_loss"]  # with the second step of training
    assert loggers[2].rows[1].get("sparsity") == after.get("sparsity")
    assert ("sparsity" in after) == (event == "wanda")
    dense = {name: before[name] for name in ("params", "kv_cache_bytes")} | ({"sparsity": 0} if event == "wanda" else {})
    assert {name: loggers[2].rows[0].get(name) for name in dense} == dense
    assert loggers[2].steps == sorted(loggers[2].steps)


def test_two_alike_are_refused(tmp_path, event):
    lit = Own()
    before, callbacks = weights(lit), [EVENTS[event](2), EVENTS[event](3)]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(tmp_path, callbacks)
    lit.configure_callbacks = lambda: callbacks  # these Lightning does not look at
    with pytest.raises(ValueError, match=f"{type(callbacks[0]).__name__} .* is listed twice"):
        trainer(tmp_path, []).fit(lit, loader(), loader(4, 4))
    assert same(weights(lit), before)
