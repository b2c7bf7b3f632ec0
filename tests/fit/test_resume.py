"""Runs that were stopped, at whatever step and with whatever callbacks, end as if they had not been, to the last bit."""

import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import billhook as bh
from billhook.engine.state import StepRandom
from kit import prunes
from kit.fits import data, same, trainer, weights
from kit.resumable import FEW, TWICE, Own, heads_then_kv_heads_then_weights, module, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    # it is resumable all the same
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]


def every_step(folder, each=1):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=each, save_top_k=-1)


def differing(one, other, path=""):
    """Where two checkpoints differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        equal = (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
        )
        return [] if equal else [path]
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [found for key in one for found in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for i, pair in enumerate(zip(one, other, strict=True)) for found in differing(*pair, f"{path}/{i}")]
    nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return [] if nan or (type(one) is type(other) and one == other) else [path]


def last(folder, step):
    checkpoint = torch.load(folder / f"step={step}.ckpt", weights_only=True)
    states = checkpoint["callbacks"]
    checkpoint["callbacks"] = {key: state for key, state in states.items() if not key.startswith("ModelCheckpoint")}
    return checkpoint


def heads_then_weights(folder):
    return [bh.HeadPruning(TWICE["heads"], **FEW), prunes.WeightPruning(bh.Wanda(), TWICE["late"], mask_adapters=True, **FEW)]


def units_then_blocks_then_weights(folder):
    return [
        bh.StructuredPruning(bh.Amount(channels=0.25), at=bh.schedules.MultiStep([0.5, 1], [1, 2]), **FEW),
        bh.DepthPruning(1, at=3, **FEW),
        prunes.WeightPruning(bh.SparseGPT(), TWICE["late"], **FEW),
    ]


@pytest.mark.daily("accumulated", "structure")
@pytest.mark.filterwarnings("ignore:X.T X is not positive definite")
@pytest.mark.parametrize(
    ("callbacks", "lora", "stops", "options"),
    [
        (heads_then_kv_heads_then_weights, False, range(1, 8), {}),
        (heads_then_kv_heads_then_weights, False, (2, 4, 5), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (heads_then_weights, True, (1, 2, 4, 5, 7), {}),
        (units_then_blocks_then_weights, False, (1, 3, 5), {}),
    ],
    ids=["all", "accumulated", "lora", "structure"],
)
@pytest.mark.slow
def test_stopped_at_any_step(files, tmp_path, callbacks, lora, stops, options):
    """Weights, optimizer, schedules, loops, masks, shapes, events and random numbers are those of the straight run."""
    straight = module(lora=lora)
    trainer(tmp_path, [*callbacks(tmp_path), every_step(tmp_path / "all")], **options).fit(straight, data(files))
    expected = last(tmp_path / "all", 8)
    for stop in stops:
        resumed, folder = module(seed=1, lora=lora), tmp_path / str(stop)
        torch.manual_seed(100 + stop)
        run = trainer(tmp_path, [*callbacks(tmp_path), every_step(folder, 8)], **options)
        run.fit(resumed, data(files), ckpt_path=tmp_path / "all" / f"step={stop}.ckpt")
        assert differing(last(folder, 8), expected) == [], stop
        assert same(weights(resumed), weights(straight)), stop


@pytest.mark.daily("steps then epochs")
@pytest.mark.parametrize(
    ("first", "second"),
    [({"max_steps": 7}, {"max_steps": 14}), ({"max_epochs": 1}, {"max_epochs": 2}), ({"max_steps": 7}, {"max_epochs": 2})],
    ids=["steps", "epochs", "steps then epochs"],
)
@pytest.mark.slow
def test_stopped_by_the_length_of_the_fit(files, tmp_path, first, second):
    """Where nothing depends on the length: it is as if the fit had been as long from the start."""

    def fitted(seed, length, ckpt_path=None):
        lit = module(seed, decay="constant")
        callbacks = [bh.KVHeadConversion(1, at=2, measure_batches=0), prunes.WeightPruning(sparsity=TWICE["late"], **FEW)]
        if length is first:
            callbacks.append(ModelCheckpoint(tmp_path / str(length), save_last=True, every_n_train_steps=1))
        run = trainer(tmp_path, callbacks, **{"max_steps": -1, "max_epochs": None, **length})
        run.fit(lit, data(files), ckpt_path=ckpt_path)
        return lit

    straight = fitted(0, second)
    fitted(0, first)
    resumed = fitted(1, second, tmp_path / str(first) / "last.ckpt")
    assert same(weights(resumed), weights(straight))


def own(folder, path=None, seed=0, workers=0, callbacks=None, **options):
    lit = Own(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    used = [bh.KVHeadConversion(2, at=1, measure_batches=1)] if callbacks is None else callbacks
    kept = [] if path else [every_step(folder)]
    run = trainer(folder, [*used, *kept], max_steps=-1, **{"max_epochs": 3, **options})
    train, held_out = DataLoader(rows(8), 2, shuffle=True, num_workers=workers), DataLoader(rows(2), 2)
    run.fit(lit, train, held_out, ckpt_path=path)
    return lit


@pytest.mark.daily("mask")
@pytest.mark.parametrize("callbacks", [None, lambda: [bh.WeightPruning(bh.Magnitude(), 0.5, at=2)]], ids=["shape", "mask"])
@pytest.mark.slow
def test_a_module_and_a_loader_of_ones_own(tmp_path, callbacks):
    """Order of the examples, dropout, Python's and NumPy's random numbers, at every step of three epochs."""
    make = callbacks or (lambda: None)
    straight = own(tmp_path / "all", callbacks=make())
    assert len(set(straight.seen)) > 4
    for stop in (1, 2, 4, 5, 11):
        resumed = own(tmp_path / "again", tmp_path / "all" / f"step={stop}.ckpt", seed=stop, callbacks=make())
        assert resumed.seen == straight.seen[stop:]
        assert same(weights(resumed), weights(straight)), stop


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_loader_of_ones_own_with_workers(tmp_path):
    """Which read ahead: after the first epoch."""
    straight = own(tmp_path / "all", workers=1)
    resumed = own(tmp_path / "again", tmp_path / "all" / "step=6.ckpt", seed=1, workers=1)
    assert resumed.seen == straight.seen[6:]
    assert same(weights(resumed), weights(straight))


@pytest.mark.daily("fewer")
@pytest.mark.parametrize(("then", "now"), [(4, 2), (2, 4)], ids=["fewer", "more"])
def test_another_number_of_examples_at_once(files, tmp_path, then, now):
    """As on other devices, which split a batch: each example of the epoch is seen once all the same, and the next is whole."""

    class Seen(pl.Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows += [tuple(row) for row in batch["input_ids"].tolist()]

    kept, straight, resumed = every_step(tmp_path), Seen(), Seen()
    epochs = {"max_steps": -1, "max_epochs": 2}
    trainer(tmp_path, [kept, straight], **epochs).fit(module(), data(files, batch_size=then))
    stop = 16 // then
    run = trainer(tmp_path, [resumed, bh.WeightPruning(bh.Magnitude(), 0.5, at=0)], **epochs)
    run.fit(module(), data(files, batch_size=now), ckpt_path=tmp_path / f"step={stop}.ckpt")
    sizes = {batch: len(run.datamodule.splits["train"]) // batch * batch for batch in (then, now)}
    rest, least = sizes[now] - 16, min(sizes.values())
    assert len(resumed.rows) == rest + sizes[now]
    assert resumed.rows[: least - 16] == straight.rows[16:least]
    assert resumed.rows[rest:][:least] == straight.rows[sizes[then] :][:least]


def test_steps_and_processes_draw_other_random_numbers_and_the_same_again():
    noise, again = StepRandom(), StepRandom()

    def drawn(one, step, rank):
        with one.drawn(torch.device("cpu"), step, rank):
            return float(torch.rand(()))

    before = torch.get_rng_state()
    numbers = [drawn(noise, step, rank) for step in range(3) for rank in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(numbers)) == 6
    again.load_state_dict(noise.state_dict())
    assert [drawn(again, step, rank) for step in range(3) for rank in range(2)] == numbers
