"""Heads that move towards each other before they are cut."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook import KVHeadConversion, Magnitude, RepairConfig, WeightPruning
from billhook.kv_heads.config import kv_heads_of
from billhook.schedules import MultiStep
from kit.families import tokens
from kit.fits import data, module, same, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
K = "model.model.layers.0.self_attn.k_proj.weight"
QUICK = {"calibration": 4, "measure_batches": 0}


def conversion(heads=2, at=5, over=3, **options):
    return KVHeadConversion(heads, at, over=over, **QUICK | options)


def small(seed=0, **changes):
    return module(seed, num_hidden_layers=1, **changes)


class Seen(Callback):
    """The weights, and the logits, at the beginning of each training step and at the end."""

    def __init__(self):
        self.states, self.logits, self.ids = [], [], tokens()

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.states.append(weights(pl_module))
        with torch.no_grad():
            self.logits.append(pl_module.model(self.ids).logits)

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module)


class Still(Callback):
    """No step of the optimizer has an effect."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.0


def checkpoints(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


def heads(state):
    """`[groups, heads, width, hidden]`."""
    return state[K].view(2, -1, 4, 32)


@pytest.mark.parametrize(("method", "at", "over"), [("mean", 5, 3), ("first", 3, 3), ("mean", 0.625, 0.375)])
def test_each_step_goes_an_equal_part_of_the_way(files, tmp_path, method, at, over):
    seen = Seen()
    trainer(tmp_path, [Still(), conversion(at=at, over=over, method=method), seen]).fit(small(), data(files))
    first, end = heads(seen.states[0]), 3 if method == "first" else 5
    dense = heads(weights(small()))
    target = dense.mean(1, keepdim=True) if method == "mean" else dense[:, :1]
    for step in range(end):
        share = max(0, step - (end - 3) + 1) / 3
        torch.testing.assert_close(heads(seen.states[step]), dense + share * (target - dense), atol=1e-6, rtol=1e-5)
    assert (share, first.shape[1]) == (1, 2)
    torch.testing.assert_close(heads(seen.states[end]), target, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "mean"),
        ({"method": "first"}, "first"),
        ({"method": "aligned"}, "aligned"),
        ({"method": bh.kv_methods.Mean("similar")}, "mean, similar heads grouped"),
    ],
    ids=["mean", "first", "aligned", "similar"],
)
def test_heads_are_equal_before_the_last_step_and_nothing_is_lost_at_the_cut(files, tmp_path, options, told):
    """Whatever training did in between; the cut itself loses what the last step moved them apart."""
    seen, callback = Seen(), conversion(measure_batches=None, **options)
    trainer(tmp_path, [callback, seen]).fit(small(), data(files))
    last = heads(seen.states[4])
    assert torch.equal(last[:, 0], last[:, 1])
    assert not torch.equal(heads(seen.states[3])[:, 0], heads(seen.states[3])[:, 1])
    (event,) = callback.events
    assert event["step"] == 5
    assert event["what"] == f"4 -> 2 KV heads ({told}, over 3 steps)"
    assert event["after"]["val_loss"] == pytest.approx(event["before"]["val_loss"], rel=1e-2)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:KVHeadConversion. training ended")
def test_to_turn_heads_towards_each_other_changes_nothing(files, tmp_path):
    """The first of a thousand moves is small, so what the model gives is as it was."""
    seen = Seen()
    run = trainer(
        tmp_path, [Still(), conversion(at=1002, over=1000, method="aligned"), seen], max_steps=1002, limit_train_batches=4
    )
    run.fit_loop.epoch_loop.max_steps = 1002
    run.callbacks.insert(0, Stop())
    run.fit(small(), data(files))
    assert (seen.states[2][K] - seen.states[1][K]).norm() > 0.1 * seen.states[1][K].norm()
    torch.testing.assert_close(seen.logits[2], seen.logits[1], atol=2e-3, rtol=2e-3)


def test_optimizer_state_stays_on_the_way_and_starts_anew_where_heads_are_turned(files, tmp_path):
    for method, count in (("mean", 8), ("aligned", 6)):
        lit = small()
        run = trainer(tmp_path, [conversion(method=method)])
        run.fit(lit, data(files))
        steps = {name: int(run.optimizers[0].state[parameter]["step"]) for name, parameter in lit.named_parameters()}
        assert {steps[name] for name in steps if "self_attn" in name} == {count}
        assert {steps[name] for name in steps if "self_attn" not in name} == {8}


class Saves(Callback):
    """A checkpoint from between an optimizer's step and what other callbacks do after it."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "early.ckpt"))


def test_a_checkpoint_from_before_a_move_resumes_with_the_move(files, tmp_path):
    straight, resumed = small(), small(seed=1)
    trainer(tmp_path, [Saves(), conversion(method="aligned")], max_steps=6).fit(straight, data(files))
    run = trainer(tmp_path, [conversion(method="aligned")], max_steps=6)
    run.fit(resumed, data(files), ckpt_path=tmp_path / "early.ckpt")
    assert same(weights(resumed), weights(straight))


def test_a_checkpoint_of_a_run_without_it_moves_in_the_steps_that_are_left(files, tmp_path):
    trainer(tmp_path, [checkpoints(tmp_path)], max_steps=4).fit(small(), data(files))
    for stop, told in ((3, "(mean, over 3 steps)"), (4, "(mean, over 3 steps)")):
        seen, callback = Seen(), conversion()
        run = trainer(tmp_path, [callback, seen], max_steps=6)
        run.fit(small(seed=1), data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert torch.equal(*heads(seen.states[4 - stop]).unbind(1))
        assert callback.events[0]["what"].endswith(told)


def test_stages_each_have_their_way(files, tmp_path):
    seen, callback = Seen(), conversion([2, 1], [3, 6], method="aligned")
    trainer(tmp_path, [callback, seen]).fit(small(), data(files))
    assert [(event["step"], event["what"]) for event in callback.events] == [
        (3, "4 -> 2 KV heads (aligned, over 3 steps)"),
        (6, "2 -> 1 KV heads (aligned, over 3 steps)"),
    ]
    assert torch.equal(*heads(seen.states[2]).unbind(1))
    assert torch.equal(*seen.states[5][K].view(2, 4, 32))
    assert seen.states[6][K].shape == (4, 32)


def test_layer_by_layer(files, tmp_path):
    """Of each event's attentions only, and resumed in the middle."""
    at = MultiStep([0.5, 1.0], [2, 5])
    straight, seen = module(), Seen()
    callback = conversion(at=at, over=2, method="aligned")
    trainer(tmp_path, [callback, seen, checkpoints(tmp_path)], max_steps=6).fit(straight, data(files))
    other = K.replace("layers.0", "layers.1")
    assert torch.equal(*seen.states[1][other].view(2, 2, 4, 32).unbind(1))
    assert seen.states[2][other].shape == (8, 32)
    assert torch.equal(*heads(seen.states[4]).unbind(1))
    assert seen.states[5][K].shape == (8, 32)
    assert [event["step"] for event in callback.events] == [2, 5]
    for stop in (1, 4):
        resumed, again = module(seed=1), conversion(at=at, over=2, method="aligned")
        trainer(tmp_path, [again], max_steps=6).fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight)), stop


def test_masks_begin_when_it_has_ended(files, tmp_path):
    lit, pruning = small(), WeightPruning(Magnitude(), sparsity=0.5, at=5, measure_batches=0)
    trainer(tmp_path, [conversion(), pruning]).fit(lit, data(files))
    assert kv_heads_of(lit) == 2
    assert all((lit.model.get_submodule(name).weight == 0).float().mean() >= 0.45 for name in pruning.masks)


def test_a_second_fit_starts_anew(files, tmp_path):
    callback, ends = conversion(method="aligned"), []
    for _ in range(2):
        lit = small()
        trainer(tmp_path, [callback], max_steps=6).fit(lit, data(files))
        ends.append(weights(lit))
    assert same(*ends)


def test_fast_dev_run_tries_it_out(files, tmp_path):
    lit = small()
    trainer(tmp_path, [conversion(1, at=100, over=50)], max_steps=-1, fast_dev_run=2).fit(lit, data(files))
    assert kv_heads_of(lit) == 1


class TestRefused:
    """Before anything has changed."""

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"at": "start"}, "over=3 needs steps before the conversion"),
            ({"method": "svd"}, "over=3 is not supported by method='svd', .* Use 'mean', 'first', or 'aligned'"),
            ({"method": bh.kv_methods.Mean(renorm=True)}, "over=3 is not supported by method='mean, norms restored'"),
            ({"method": "auto"}, "not supported by method='auto'"),
            ({"method": "random"}, "not supported by method='random'"),
            ({"repair": RepairConfig()}, "over=3 cannot be combined with repair"),
            ({"over": -1}, "over=-1 is negative"),
            ({"over": 1.5}, "over=1.5 as a float is a fraction"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            conversion(**options)

    @pytest.mark.parametrize(
        ("callbacks", "match"),
        [
            ([(2, 2, 3)], "over=3 steps do not fit before the stage at step 2: there are 2 since training began"),
            ([([2, 1], [3, 5], 3)], "over=3 .* at step 5: there are 2 since the stage at step 3"),
            ([(2, 2, 0), (1, 4, 3)], "over=3 .* at step 4: there are 2 since the stage at step 2"),
            ([(2, 0.5, 0.75)], "over=6 steps do not fit before the stage at step 4: there are 4 since training began"),
            ([(2, MultiStep([0.5, 1], [3, 5]), 3)], "over=3 .* at step 5: there are 2 since the stage at step 3"),
        ],
    )
    def test_ways_that_are_longer_than_there_is_time(self, files, tmp_path, callbacks, match):
        lit = module()
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, [conversion(*one) for one in callbacks]).fit(lit, data(files))
        assert same(weights(lit), before)

    def test_a_fraction_of_endless_training(self, files, tmp_path):
        lit = module()
        lit.decay = "constant"
        match = r"over=0\.1 is a fraction of an unknown training length\. Set Trainer\(max_steps=\.\.\.\), or use a step"
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, [conversion(over=0.1)], max_steps=-1, max_epochs=-1).fit(lit, data(files))
