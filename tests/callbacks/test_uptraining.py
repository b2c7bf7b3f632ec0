import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from billhook import KVHeadConversion, TransformerModule
from billhook.callbacks.uptraining import Uptraining
from kit.families import llama
from kit.fits import data, module, same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
ENDLESS = {"max_steps": -1, "max_epochs": -1, "limit_val_batches": 0}


class Rates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def fitted(folder, files, callbacks, lit=None, source=None, ckpt_path=None, **options):
    run, lit = trainer(folder, callbacks, **ENDLESS | options), lit or module()
    run.fit(lit, source or data(files), ckpt_path=ckpt_path)
    return run, lit


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"pretraining_steps": 100}, 5),  # alpha is the paper's 0.05
        ({"pretraining_steps": 101}, 6),
        ({"alpha": 0.07, "pretraining_steps": 100}, 7),  # 0.07 * 100 in floats is above 7
        ({"alpha": 1, "pretraining_steps": 3}, 3),
        ({"pretraining_tokens": 2 * 16 * 60}, 3),  # a step has two blocks of 16
        ({"pretraining_tokens": 2.0 * 16 * 61}, 4),
    ],
)
def test_the_length_of_the_fit(files, tmp_path, budget, steps):
    run, _ = fitted(tmp_path, files, [callback := Uptraining(**budget)])
    assert (run.global_step, run.max_steps, callback.steps) == (steps, steps, steps)


def test_it_is_as_max_steps_would_be(files, tmp_path):
    """The schedule falls to its end at it, and so do the weights."""
    rates, others = Rates(), Rates()
    _, lit = fitted(tmp_path, files, [rates, Uptraining(pretraining_steps=160)])
    _, other = fitted(tmp_path, files, [others], max_steps=8)
    assert rates.seen == others.seen
    assert len(rates.seen) == 8
    assert same(weights(lit), weights(other))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(
    ("heads", "at", "steps"), [(2, 0.5, [4]), (2, "start", [0]), ([2, 1], ["start", 0.5], [0, 4])], ids=["half", "start", "both"]
)
def test_fractions_are_of_it_in_any_order(files, tmp_path, first, heads, at, steps):
    conversion = KVHeadConversion(heads, at=at, measure_batches=0)
    callbacks = [conversion, Uptraining(pretraining_steps=160)]
    fitted(tmp_path, files, callbacks[::-1] if first else callbacks)
    assert [event["step"] for event in conversion.events] == steps


def blocks(kind):
    """A loader that draws from torch's random numbers, or from a generator of its own."""
    torch.manual_seed(3)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (12, 16))]
    generator = torch.Generator().manual_seed(1) if kind == "generator" else None
    return DataLoader(rows, batch_size=2, shuffle=True, generator=generator)


@pytest.mark.parametrize("kind", ["own", "torch", "generator"])
def test_counting_tokens_changes_nothing_else(files, tmp_path, kind):
    lits = []
    for callbacks, steps in (([Uptraining(pretraining_tokens=2 * 16 * 160)], -1), ([], 8)):
        lit, source = module(), data(files) if kind == "own" else blocks(kind)
        run, _ = fitted(tmp_path, files, callbacks, lit, source, max_steps=steps)
        assert run.global_step == 8
        lits.append(lit)
    assert same(*map(weights, lits))


def test_tokens_count_over_accumulated_batches_without_padding(files, tmp_path):
    run, _ = fitted(tmp_path, files, [Uptraining(pretraining_tokens=640)], accumulate_grad_batches=3)
    assert run.global_step == math.ceil(0.05 * 640 / (2 * 16 * 3)) == 1
    ids = torch.randint(3, 64, (8, 8))
    mask = torch.ones(8, 8, dtype=torch.long)
    mask[:, 5:] = 0
    rows = [{"input_ids": i, "labels": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    callback = Uptraining(alpha=0.5, pretraining_tokens=100)
    fitted(tmp_path, files, [callback], TransformerModule(llama()), DataLoader(rows, batch_size=2))
    assert callback.steps == 5


class TestResume:
    def fitted(self, files, folder, callback, seed=0, ckpt_path=None):
        keep = ModelCheckpoint(folder / f"run{seed}", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        return fitted(folder, files, [callback, keep], module(seed), ckpt_path=ckpt_path)

    @pytest.mark.parametrize("budget", [{"pretraining_steps": 160}, {"pretraining_tokens": 32 * 160}], ids=["steps", "tokens"])
    def test_ends_as_the_straight_run(self, files, tmp_path, budget):
        _, straight = self.fitted(files, tmp_path, Uptraining(**budget))
        run, lit = self.fitted(files, tmp_path, Uptraining(**budget), seed=1, ckpt_path=str(tmp_path / "run0" / "step=3.ckpt"))
        assert run.global_step == 8
        assert same(weights(lit), weights(straight))

    def test_another_length_is_refused(self, files, tmp_path):
        self.fitted(files, tmp_path, Uptraining(pretraining_steps=160))
        with pytest.raises(ValueError, match="checkpoint's run has 8 steps, and this run 16. Use the same alpha"):
            self.fitted(files, tmp_path, Uptraining(0.1, 160), seed=1, ckpt_path=str(tmp_path / "run0" / "step=3.ckpt"))

    def test_a_second_fit_of_one_trainer(self, files, tmp_path):
        run, lit = fitted(tmp_path, files, [Uptraining(pretraining_steps=60)])
        run.fit(lit, data(files))
        assert run.global_step == 3


def test_a_trial_stays_one(files, tmp_path):
    run, _ = fitted(tmp_path, files, [Uptraining(pretraining_steps=1000)], fast_dev_run=2)
    assert run.global_step == 2


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_without_epochs(files, tmp_path):
    """More steps than an epoch has, and no bound of Lightning's stands beside it."""
    run, _ = fitted(tmp_path, files, [Uptraining(alpha=0.2, pretraining_steps=75)], max_epochs=None)
    assert (run.global_step, run.max_epochs) == (15, -1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"alpha": 0.0, "pretraining_steps": 10}, r"alpha=0.0 must be in .0, 1."),
        ({"alpha": 5, "pretraining_steps": 10}, r"alpha=5 must"),
        ({"alpha": True, "pretraining_steps": 10}, r"alpha=True must"),
        ({"alpha": math.nan, "pretraining_steps": 10}, r"alpha=nan must"),
        ({}, "Pass either pretraining_steps or pretraining_tokens, got neither"),
        ({"pretraining_steps": 10, "pretraining_tokens": 10}, "Pass either pretraining_steps or pretraining_tokens"),
        ({"pretraining_steps": 0}, "pretraining_steps=0 must be a whole number of at least 1"),
        ({"pretraining_steps": True}, "pretraining_steps=True must"),
        ({"pretraining_tokens": 1.5}, "pretraining_tokens=1.5 must"),
        ({"pretraining_tokens": math.inf}, "pretraining_tokens=inf must"),
    ],
)
def test_arguments_are_checked(arguments, match):
    with pytest.raises(ValueError, match=match):
        Uptraining(**arguments)


class ByHand(TransformerModule):
    def __init__(self):
        super().__init__(llama(vocab_size=2048), decay="constant")
        self.automatic_optimization = False


STEPS, TOKENS = {"pretraining_steps": 100}, {"pretraining_tokens": 1000}


@pytest.mark.parametrize(
    ("budget", "options", "match"),
    [
        (STEPS, {"max_steps": 6}, "max_steps=6 of the Trainer conflicts with Uptraining, .* to 5 steps"),
        (STEPS, {"max_epochs": 2}, "max_epochs=2 of the Trainer .* Use -1"),
        (TOKENS, {"callbacks": [GradientAccumulationScheduler({1: 2})]}, "known before training. Use pretraining_steps"),
        (TOKENS, {"lit": ByHand}, "known before training. Use pretraining_steps"),
        (TOKENS, {"source": lambda: DataLoader([torch.zeros(2)])}, "the training batches have no 'input_ids'"),
        (TOKENS, {"source": lambda: iter([{"input_ids": torch.ones(2, 8)}])}, "can be read only once"),
    ],
    ids=["steps", "epochs", "accumulation", "by hand", "no tokens", "an iterator"],
)
def test_what_it_cannot_go_with(files, tmp_path, budget, options, match):
    given = dict(options)
    callbacks = [Uptraining(**budget), *given.pop("callbacks", [])]
    lit, source = (given.pop(name, lambda: None)() for name in ("lit", "source"))
    with pytest.raises(ValueError, match=match):
        fitted(tmp_path, files, callbacks, lit, source, **given)


def test_the_same_number_of_steps_may_stand_beside_it(files, tmp_path):
    run, _ = fitted(tmp_path, files, [Uptraining(pretraining_steps=60)], max_steps=3)
    assert run.global_step == 3
