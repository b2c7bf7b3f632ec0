"""Blocks that are ranked and removed in a fit: when, which, what the optimizer and checkpoints then hold."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

import billhook as bh
from billhook.checkpoints.export import export
from kit import fits
from kit.families import build, tokens
from kit.fits import data, same, trainer, weights
from kit.units import MIXED, influence, t5
from kit.weight_pruning import checkpoints

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]
LAYERS = "model.layers"


def module(seed=0, **changes):
    """Four layers."""
    return fits.module(seed, **{"num_hidden_layers": 4} | changes)


def mixed(seed=0):
    """Four layers of two kinds, with a list in the config that says which."""
    torch.manual_seed(seed)
    model = build("qwen2", vocab_size=2048, num_hidden_layers=4, use_sliding_window=True, **MIXED)
    return bh.TransformerModule(model, lr=1e-2, warmup=2)


def pruning(blocks=2, **options):
    return bh.DepthPruning(blocks, **{"calibration": 6, "measure_batches": 0} | options)


class Depth(pl.Callback):
    """How many blocks there are at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(len(pl_module.model.model.layers))


def bare(lit):
    """Nothing of the callback is left."""
    hooks = (own for part in lit.modules() for own in (part._forward_pre_hooks, part._forward_hooks))
    return not any(hooks) and not {"log", "on_save_checkpoint", "on_load_checkpoint"} & vars(lit).keys()


WHEN = {
    "start": ({}, [2] * 8),
    "a step": ({"at": 3, "importance": bh.importance.Ablation()}, [4] * 3 + [2] * 5),
    "a fraction": ({"blocks": 0.25, "at": 0.5}, [4] * 4 + [3] * 4),
    "the end": ({"at": 8, "greedy": True}, [4] * 8),
}


class TestFit:
    @pytest.mark.parametrize("when", WHEN)
    def test_it_happens_at_its_step(self, files, tmp_path, when):
        options, seen = WHEN[when]
        lit, watch, callback = module(), Depth(), pruning(**options)
        run = trainer(tmp_path, [callback, watch])
        run.fit(lit, data(files))
        assert watch.seen == seen
        left = 2 if when == "the end" else seen[-1]
        assert len(lit.model.model.layers) == lit.model.config.num_hidden_layers == left
        assert {id(p) for group in run.optimizers[0].param_groups for p in group["params"]} == {id(p) for p in lit.parameters()}
        assert bare(lit)
        (event,) = callback.events
        assert event["what"].startswith(f"4 -> {left} blocks ({type(callback.importance).__name__}): without ")
        assert event["after"]["params"] == sum(p.numel() for p in lit.parameters())

    @pytest.mark.parametrize("greedy", [False, True])
    def test_those_of_least_influence_go(self, tmp_path, greedy):
        lit, examples = module(), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(3, 9).split(1)]
        model = lit.model.eval()
        whole = {name: torch.cat([one[name] for one in examples]) for name in examples[0]}
        scores, left, expected = influence(model, whole), list(range(4)), []
        if greedy:
            for _ in range(2):
                lowest = int(influence(model, whole)[1:].argmin()) + 1
                expected.append(left.pop(lowest))
                bh.pruning.prune_units(model, [lowest], kind="block")
        else:
            expected = sorted(range(1, 4), key=lambda n: float(scores[n]))[:2]
        lit = module()
        given = [{**one, "labels": one["input_ids"]} for one in examples]
        callback = pruning(2, calibration=given, first=1, greedy=greedy)
        loader = DataLoader(given, None)
        trainer(tmp_path, [callback], max_steps=1).fit(lit, loader, loader)
        assert callback.plan.units == {LAYERS: sorted(expected)}


class TestCheckpoints:
    @pytest.mark.daily("mixed")
    @pytest.mark.parametrize("make", [module, mixed])
    def test_outside_of_a_fit_also_one_from_before(self, files, tmp_path, make):
        callback, lit = pruning(2, at=3, measure_batches=None), make()
        run = trainer(tmp_path, [callback, checkpoints(tmp_path)])
        run.fit(lit, data(files))
        ((event),) = callback.events
        fresh = trainer(tmp_path, [pruning(2, at=3)])
        for one, subject in ((run, lit), (fresh, make(seed=1))):
            for step, blocks in ((2, 4), (3, 2), (1, 4), (8, 2)):
                said = one.validate(subject, data(files), ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)[0]
                assert len(subject.model.model.layers) == subject.model.config.num_hidden_layers == blocks
                if step == 3:
                    assert said["val_loss"] == pytest.approx(event["after"]["val_loss"], rel=1e-5)

    @pytest.mark.daily("mixed")
    @pytest.mark.parametrize("make", [module, mixed])
    def test_loaded_and_exported_without_the_run(self, files, tmp_path, make):
        lit = make()
        trainer(tmp_path, [pruning(2, at=2), checkpoints(tmp_path, save_weights_only=True)], max_steps=4).fit(lit, data(files))
        loaded = bh.TransformerModule.load_from_checkpoint(tmp_path / "step=4.ckpt", model=make(seed=1).model)
        assert same(weights(loaded), weights(lit))
        saved = export(tmp_path / "step=4.ckpt", tmp_path / "out")
        assert saved.way == "plain"
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = tokens()
        with torch.no_grad():
            expected = lit.model.eval()(ids).logits
            assert torch.equal(plain.eval()(ids).logits, expected)
            assert torch.equal(loaded.model.eval()(ids).logits, expected)
        assert plain.config.num_hidden_layers == 2

    def test_a_layers_checkpoint_of_another_depth_is_refused(self, files, tmp_path):
        trainer(tmp_path, [pruning(1), checkpoints(tmp_path)], max_steps=2).fit(module(num_hidden_layers=3), data(files))
        with pytest.raises(ValueError, match=f"{LAYERS} had 3 blocks originally, but 4 in LlamaForCausalLM"):
            trainer(tmp_path, [pruning(1)]).fit(module(), data(files), ckpt_path=tmp_path / "step=2.ckpt")


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"blocks": None}, "blocks=None must be a number"),
            ({"blocks": 1.5}, "blocks=1.5 must be a fraction"),
            ({"blocks": 1.0}, "blocks=1.0 must be a fraction"),
            ({"blocks": -1}, "blocks=-1 must be"),
            ({"first": -1}, "first=-1 must be a whole number"),
            ({"at": bh.schedules.Linear(final=1.0)}, "at=Linear.* must be one of start or a number"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            pruning(**options)

    @pytest.mark.parametrize(
        ("callbacks", "message"),
        [
            (lambda: [pruning(4)], f"blocks=4 would remove 4 of 4 blocks of {LAYERS}. At most 3 can be removed: blocks=3"),
            (lambda: [pruning(2, first=2, last=1)], "would remove 2 of 4 blocks .* At most 1 can be removed"),
            (lambda: [pruning(1, at=99)], "99"),
            (lambda: [pruning(1), EMAWeightAveraging()], "EMAWeightAveraging does not support"),
        ],
    )
    def test_before_training(self, files, tmp_path, callbacks, message):
        lit = module()
        before = weights(lit)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callbacks()).fit(lit, data(files))
        assert same(weights(lit), before)
        assert bare(lit)

    def test_blocks_that_cannot_go_leave_all_as_it_was(self, tmp_path):
        lit = bh.TransformerModule(t5(), task="seq2seq-lm", lr=1e-2)
        with torch.no_grad():  # their first blocks change the least
            for stack in (lit.model.encoder, lit.model.decoder):
                for name, parameter in stack.block[0].named_parameters():
                    parameter.mul_(0 if name.endswith(("o.weight", "wo.weight")) else 1)
        before, loader = weights(lit), DataLoader([{"input_ids": tokens(), "labels": tokens(2, 5)}], None)
        with pytest.raises(ValueError, match="encoder.block.0.*relative_attention_bias.weight"):
            trainer(tmp_path, [pruning(1, calibration=loader)]).fit(lit, loader, loader)
        assert same(weights(lit), before)
        assert bare(lit)
