"""Whatever number format training uses, events happen at their step and leave a model that trains on and is saved as it is."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import billhook as bh
from kit.events import END, EVENTS, FEW, Own, Watch, figures, fit, loader, same_after_reload
from kit.fits import same, trainer, weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]


def float16(scale=2.0**12):
    """On a CPU Lightning takes bfloat16 for `16-mixed`, unless a plugin is given."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))}


PRECISIONS = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "64-true": lambda: {"precision": "64-true"},
    "16-mixed": float16,
}
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.daily("wanda-*", "structure-bf16-mixed", "heads-16-mixed", "svd-bf16-true")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("event", EVENTS)
def test_training_goes_on_in_its_precision(tmp_path, event, precision):
    lit, callback, _ = fit(tmp_path, event, **PRECISIONS[precision]())
    assert {p.dtype for p in lit.parameters()} == {DTYPES.get(precision, torch.float32)}
    assert torch.get_default_dtype() == torch.float32
    assert callback.events[0]["before"]["val_loss"] != callback.events[0]["after"]["val_loss"]
    assert same_after_reload(lit, tmp_path)


class Half(Own):
    """With all in float16 Adam's epsilon is zero."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.mark.daily("wanda", "structure", "svd")
@pytest.mark.parametrize("event", EVENTS)
def test_float16_throughout(tmp_path, event, monkeypatch):
    monkeypatch.setattr(Watch, "still", True)  # a few steps are less than half of the last digit
    lit, *_ = fit(tmp_path, event, lit=Half(), precision="16-true")
    assert {p.dtype for p in lit.parameters()} == {torch.float16}
    assert same_after_reload(lit, tmp_path)


class Steps(pl.Callback):
    """After each batch, Lightning's step and the optimizer's own."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        own = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
        self.seen.append((trainer.global_step, *own))


@pytest.mark.daily("wanda", "structure")
@pytest.mark.parametrize("event", EVENTS)
def test_steps_that_a_scaler_skips_count_as_lightning_counts_them(tmp_path, event, monkeypatch):
    """From 2^20 on the scale is halved until gradients are finite."""
    monkeypatch.setattr(Watch, "still", True)
    steps = Steps()
    lit, _, watch = fit(tmp_path, event, more=[steps], max_steps=8, **float16(2.0**20))
    skipped = [step for step, *own in steps.seen if not own]
    assert skipped[:2] == [1, 2]
    assert steps.seen[-1] == (8, 8 - len(skipped))
    assert watch.losses[-1] != watch.losses[3]


class Faint(Own):
    """A loss whose gradients are below what float16 holds."""

    def training_step(self, batch, batch_idx):
        return 1e-5 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "importance", [bh.importance.GateGradient(), bh.Taylor("first"), bh.Taylor("second")], ids=["gate", "first", "second"]
)
def test_gradients_that_float16_would_lose_are_not_lost(tmp_path, importance):
    """Training scales its loss; scores are of one that is not scaled."""
    scores = []
    for options in ({}, float16()):
        callback = bh.HeadPruning(0.5, at=2, importance=importance, **FEW)
        trainer(tmp_path, [callback], max_steps=2, **options).fit(Faint(), loader(), loader(4, 4))
        scores.append(callback.record.scores)
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, atol=1e-2, rtol=1e-2)


def test_a_resumed_scaler_goes_on(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    lit, *_ = fit(tmp_path, "wanda", max_steps=8, more=[keep], **float16(2.0**14))
    again = Own()
    run = trainer(tmp_path, [EVENTS["wanda"](2)], max_steps=8, **float16(1.0))
    run.fit(again, loader(), loader(4, 4), ckpt_path=tmp_path / "step=4.ckpt")
    assert run.precision_plugin.scaler.get_scale() == 2.0**14
    assert figures(again) == END["wanda"]
    assert same(weights(again), weights(lit))
