"""A fit with LoRA: masks grow round by round, adapters act only where weights are kept, and merging changes nothing."""

import copy
from functools import partial

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import billhook as bh
from billhook.adapters.masked import unmask_adapters
from billhook.adapters.masked_layer import MaskedLora
from billhook.model.find import find_transformer
from billhook.model.layers import prunable
from kit.adapters import gpt2
from kit.families import llama
from kit.fits import data, same, trainer, weights
from kit.weight_pruning import EPOCHS, RAMP, ROUNDS, Plain, checkpoints, injected, loader, pruning

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")


def wrapped(build=llama, **options):
    """A user's own module that holds a PeftModel, and trains nothing but LoRA."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": build is gpt2} | options
    lit = Plain(peft.get_peft_model(build(), peft.LoraConfig(**settings)))
    lit.optimizer = "foreach"
    return lit


def transformer(lit):
    return find_transformer(lit)


def layers_of(lit):
    """Every layer of LoRA by the name of its linear."""
    return {name: module for name, module in transformer(lit).named_modules() if isinstance(module, peft.tuners.lora.Linear)}


def logits(model):
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        return evaluated(input_ids=torch.arange(3, 35).view(2, 16)).logits


def merges_exactly(lit, callback):
    """Merging loses nothing, and gives a model with the callback's zeros that computes the same."""
    expected = logits(transformer(lit))
    result = bh.training.merge(copy.deepcopy(transformer(lit)))
    assert set(result.error.values()) == {0.0}
    torch.testing.assert_close(logits(result.model), expected, atol=1e-5, rtol=1e-4)
    linears = prunable(result.model)
    assert callback.masks.keys() == linears.keys()
    assert all(torch.equal(linears[name].weight != 0, mask) for name, mask in callback.masks.items())


class Watch(pl.Callback):
    """The sparsity at each training forward, where what is masked is what is held."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        masks = self.callback.masks
        assert same({name: layer.keep for name, layer in layers_of(pl_module).items() if type(layer) is MaskedLora}, masks)
        gone = sum(int((~mask).sum()) for mask in masks.values())
        self.seen.append(round(gone / max(1, sum(mask.numel() for mask in masks.values())), 4))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_masks_grow_and_merging_is_exact(tmp_path, build):
    lit, callback = wrapped(build, lora_dropout=0.1), pruning(bh.Magnitude(), RAMP, mask_adapters=True)
    before, watch = weights(lit), Watch(callback)
    trainer(tmp_path, [callback, watch]).fit(lit, loader())
    assert watch.seen[:3] == [0, 0, 0]
    assert 0.3 < watch.seen[3] == watch.seen[4] < watch.seen[5] == watch.seen[6] < watch.seen[7] == 0.5
    after = weights(lit)
    assert after.keys() == before.keys()
    assert all(torch.equal(value[value != 0], before[name][value != 0]) for name, value in after.items() if "lora" not in name)
    merges_exactly(lit, callback)
    unmasked = copy.deepcopy(lit.net)
    unmask_adapters(unmasked)
    assert (logits(unmasked) - logits(lit.net)).abs().max() > 1e-4


class ByHand(pl.Callback):
    """The same without billhook's layers: a hook computes each output from the matrices."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            masks = bh.prune(pl_module.net, bh.Magnitude(), sparsity=0.5).masks(pl_module.net)
            for name, mask in masks.items():
                pl_module.net.get_submodule(name).register_forward_hook(lambda m, x, _, mask=mask: self.forward(m, x[0], mask))

    def forward(self, layer, x, mask):
        product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        return x @ (layer.base_layer.weight + product * mask).t()


def test_it_is_what_masking_by_hand_is(tmp_path):
    one, other, third = wrapped(), wrapped(), wrapped()
    trainer(tmp_path, [pruning(bh.Magnitude(), 0.5, at=3, mask_adapters=True)]).fit(one, loader())
    trainer(tmp_path, [ByHand()]).fit(other, loader())
    trainer(tmp_path, [pruning(bh.Magnitude(), 0.5, at=3)]).fit(third, loader())
    expected = weights(other)
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in weights(one).items())
    assert not all(torch.allclose(value, expected[name], atol=1e-4) for name, value in weights(third).items())


@pytest.mark.parametrize("masked", [True, False])
def test_later_blocks_are_scored_on_what_pruned_blocks_hand_on(tmp_path, masked):
    """Wanda by hand in the second block: LoRA of the first adds to its pruned weights only if it is not masked."""
    lit, seen, before = wrapped(lora_alpha=64), [], {}
    batches = [{"input_ids": torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(n))} for n in range(3)]
    copies = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: before.setdefault(trainer.global_step, copy.deepcopy(module.net).eval())
    )
    callback = pruning(bh.Wanda(), 0.5, at=3, calibration=batches, mask_adapters=masked)
    trainer(tmp_path, [copies, callback]).fit(lit, loader())
    model, (first, second) = before[3], (".layers.0.", ".layers.1.self_attn.q_proj")
    masks = {next(n for n, _ in model.named_modules() if n.endswith(name)): mask for name, mask in callback.masks.items()}
    for name in (name for name in masks if first in name):
        layer = model.get_submodule(name)
        layer.base_layer.weight.data *= masks[name]
        hook = partial(ByHand().forward, mask=masks[name] if masked else torch.tensor(1))
        layer.register_forward_hook(lambda layer, x, _, hook=hook: hook(layer, x[0]))
    (name,) = (name for name in masks if second in name)
    model.get_submodule(name).register_forward_hook(lambda _, x, __: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    weight = model.get_submodule(name).base_layer.weight.detach()
    scores = weight.abs() * torch.cat(seen).norm(dim=0)
    assert torch.equal(scores.argsort(1).argsort(1) >= weight.shape[1] // 2, masks[name])


def test_a_validation_alone_computes_as_the_fit_did(files, tmp_path):
    lit, callback = injected(), pruning(bh.Magnitude(), RAMP, mask_adapters=True)
    run = trainer(tmp_path, [callback, checkpoints(tmp_path)], val_check_interval=1, limit_val_batches=2)
    losses = {}

    class Losses(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    run.callbacks.append(Losses())
    run.fit(lit, data(files))
    seen = dict(losses)
    for step in (8, 2, 5):
        for model in (lit, injected(seed=1)):
            alone = trainer(tmp_path, [pruning(bh.Magnitude(), RAMP, mask_adapters=True)], limit_val_batches=2)
            (found,) = alone.validate(model, data(files), ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)
            assert found["val_loss"] == pytest.approx(seen[step], abs=1e-6), step
    unmasked = trainer(tmp_path, [pruning(bh.Magnitude(), RAMP)], limit_val_batches=2)
    (found,) = unmasked.validate(injected(), data(files), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    assert abs(found["val_loss"] - seen[8]) > 1e-5


def test_averaged_weights(tmp_path):
    lit, callback = wrapped(), pruning(bh.Magnitude(), 0.5, at=5, mask_adapters=True)
    trainer(tmp_path, [callback, EMAWeightAveraging(decay=0.9)], **EPOCHS).fit(lit, loader())
    merges_exactly(lit, callback)


def test_the_result_is_exported_as_it_computes(files, tmp_path):
    lit, callback, export = injected(), pruning(bh.Magnitude(), 0.5, at=2, mask_adapters=True), bh.Export(str(tmp_path / "out"))
    trainer(tmp_path, [callback, export]).fit(lit, data(files))
    assert export.saved.adapters == ("merged adapters of 14 layers in place, zeros kept; no update was lost")
    loaded = bh.load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(lit.model), atol=1e-5, rtol=1e-4)
    linears = prunable(loaded)
    assert all(torch.equal(linears[name].weight != 0, mask) for name, mask in callback.masks.items())
    assert type(lit.model.model.layers[0].self_attn.q_proj) is MaskedLora


class TestRefused:
    """Before anything has changed."""

    def refused(self, folder, lit, match, **options):
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(folder, [pruning(sparsity=0.5, **options)]).fit(lit, loader())
        assert same(weights(lit), before)

    def test_no_plain_lora(self, tmp_path):
        on, name = {"mask_adapters": True}, "mask_adapters=True"
        self.refused(tmp_path, Plain(), f"{name} requires LoRA adapters", **on)
        dora = wrapped(use_dora=True)
        self.refused(tmp_path, dora, rf"{name}: the adapter of .* must be plain LoRA .*, got LoRA with Dora", **on)
        others = wrapped(target_modules=["q_proj"])
        self.refused(tmp_path, others, f"{name} requires LoRA on the pruned layers", skip=["*q_proj"], **on)
        merged = wrapped()
        merged.net.merge_adapter()
        self.refused(tmp_path, merged, f"{name}: the adapters of .* are merged", **on)


@pytest.mark.parametrize("masked", [True, False])
def test_what_will_be_left_out_is_told_before_training(masked, tmp_path, caplog):
    callback = pruning(bh.Magnitude(), 0.5, at=2, mask_adapters=masked)
    with caplog.at_level("WARNING", "billhook"):
        trainer(tmp_path, [callback], max_steps=3).fit(wrapped(), loader())
    told = [record.message for record in caplog.records if "drops the effect of adapters" in record.message]
    assert [line.partition(".")[0] for line in told] == [
        f"WeightPruning: {len(callback.masks)} of the pruned linear layers have adapters"
    ] * (not masked)


KINDS = {
    "rounds": {"sparsity": RAMP, "mask_adapters": True},
    "start": {"pattern": "2:4"},
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_straight_through(files, tmp_path, kind):
    """Stopped before, at, between and after rounds; in a new module, or in one whose adapters are masked already."""
    straight, whole = injected(), pruning(**{"mask_adapters": True} | KINDS[kind])
    watch = Watch(whole)
    trainer(tmp_path, [whole, watch, checkpoints(tmp_path)]).fit(straight, data(files))
    assert watch.seen == ([0.5] * 8 if kind == "start" else ROUNDS)
    used = copy.deepcopy(straight)
    for stop, resumed in ((2, used), (3, injected(seed=1)), (4, used), (6, injected(seed=1))):
        callback = pruning(**{"mask_adapters": True} | KINDS[kind])
        watch = Watch(callback)
        trainer(tmp_path, [callback, watch]).fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert watch.seen == ([0.5] * 8 if kind == "start" else ROUNDS)[stop:]
        assert same(weights(resumed), weights(straight)), stop
        assert same(callback.masks, whole.masks)
        assert torch.equal(logits(resumed.model), logits(straight.model))
    merges_exactly(resumed, callback)
