"""Pruned weights are zero whatever steps, averages or converts them, in every kind of module."""

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import billhook as bh
from billhook.model.layers import prunable
from kit.families import llama
from kit.fits import data, module, same, trainer, weights
from kit.weight_pruning import EPOCHS, OPTIMIZERS, Plain, checkpoints, loader, pruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


def held(state, callback, prefix="model."):
    """All that the masks say is zero in a state dict, and not all else."""
    for name, mask in callback.masks.items():
        weight = next(state[key] for key in (f"{prefix}{name}.weight", f"{prefix}{name}.base_layer.weight") if key in state)
        assert not weight[~mask].any(), name
        assert weight[mask].any(), name


def check_checkpoints(folder, callback, first, last=8, prefix="model."):
    for step in range(first, last + 1):
        checkpoint = torch.load(folder / f"step={step}.ckpt", weights_only=True)
        held(checkpoint["state_dict"], callback, prefix)
        if "current_model_state" in checkpoint:
            held(checkpoint["current_model_state"], callback, prefix)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(tmp_path, optimizer):
    lit, callback = Plain(), pruning(sparsity=0.5, at=2)
    lit.optimizer = optimizer
    trainer(tmp_path, [callback, checkpoints(tmp_path)]).fit(lit, loader())
    check_checkpoints(tmp_path, callback, 2, prefix="net.")
    held(lit.state_dict(), callback, "net.")


OPTIONS = [
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"inference_mode": False, "deterministic": True, "detect_anomaly": True},
    {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "val_check_interval": 2},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
]


@pytest.mark.daily("Wanda-*")
@pytest.mark.parametrize(
    ("criterion", "options"),
    [*((bh.Wanda(), options) for options in OPTIONS), *((bh.SparseGPT(), options) for options in OPTIONS[:4])],
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else type(one).__name__,
)
def test_trainers(files, tmp_path, criterion, options):
    lit = module()
    callback = pruning(criterion, bh.schedules.MultiStep([0.25, 0.5], [0, 2]), measure_batches=1)
    trainer(tmp_path, [callback, checkpoints(tmp_path)], max_steps=4, **options).fit(lit, data(files))
    check_checkpoints(tmp_path, callback, 2, 4)
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    assert {p.dtype for p in lit.parameters()} == {dtype}
    assert callback.events[-1]["after"]["sparsity"] == 0.5
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_statistics_are_in_float32_in_any_precision(files, tmp_path, precision):
    seen = []

    class Notes(bh.SparseGPT):
        def prune(self, weight, moments, *rest):
            seen.append((moments.products.dtype, torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            return super().prune(weight, moments, *rest)

    trainer(tmp_path, [pruning(Notes(), 0.5, at=1)], max_steps=2, precision=precision).fit(module(), data(files))
    assert set(seen) == {(torch.float32, False, torch.float32)}


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "average": WeightAveraging,
    "rarely": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=3, update_starting_at_step=2),
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


@pytest.mark.daily("ema-False-2", "average-True-start", "swa-False-5", "rarely-True-2")
@pytest.mark.parametrize("at", ["start", 2, 5])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights(tmp_path, kind, first, at):
    lit, callback = Plain(), pruning(sparsity=0.5, at=at)
    callbacks = [callback, AVERAGES[kind]()]
    callbacks = (callbacks if first else callbacks[::-1]) + [checkpoints(tmp_path)]
    trainer(tmp_path, callbacks, **EPOCHS).fit(lit, loader())
    check_checkpoints(tmp_path, callback, 2 if at == "start" else at, 12, prefix="net.")
    held(lit.state_dict(), callback, "net.")


@pytest.mark.parametrize("kind", ["ema", "rarely"])
def test_averaged_weights_resume(tmp_path, kind):
    straight, resumed = Plain(), Plain()
    trainer(tmp_path, [pruning(sparsity=0.5, at=5), AVERAGES[kind](), checkpoints(tmp_path)], **EPOCHS).fit(straight, loader())
    for stop in (4, 8):  # ends of epochs
        resumed, callback = Plain(), pruning(sparsity=0.5, at=5)
        run = trainer(tmp_path, [callback, AVERAGES[kind]()], **EPOCHS)
        run.fit(resumed, loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight))
        held(resumed.state_dict(), callback, "net.")


class OwnAverage(pl.Callback):
    """An average as people write it, which nobody else knows of."""

    def on_fit_start(self, trainer, pl_module):
        self.shadow = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, value in pl_module.state_dict().items():
            self.shadow[name].lerp_(value, 0.1)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.shadow)


@pytest.mark.parametrize("first", [False, True])
def test_averages_that_nobody_knows_of(tmp_path, first):
    lit, callback = Plain(), pruning(sparsity=0.5, at=4)
    trainer(tmp_path, [callback, OwnAverage()] if first else [OwnAverage(), callback]).fit(lit, loader())
    held(lit.state_dict(), callback, "net.")


class Teacher(Plain):
    """Two models, of which `model` is the one in training."""

    def __init__(self):
        super().__init__()
        self.model, self.teacher = self.net, llama().train().requires_grad_(False)
        del self.net

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        with torch.no_grad():
            target = self.teacher(ids, attention_mask=mask).logits
        return nn.functional.mse_loss(self.model(ids, attention_mask=mask).logits, target)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_model_beside_a_teacher(tmp_path, kind):
    lit, callback = Teacher(), pruning(sparsity=0.5, at=2)
    trainer(tmp_path, [callback, AVERAGES[kind]()], **EPOCHS).fit(lit, loader())
    held(lit.state_dict(), callback)
    assert all(linear.weight.all() for linear in prunable(lit.teacher).values())


class Manual(Plain):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.steps = []

    def calibration_batches(self):
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in loader()]

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        for optimizer in (one, other):
            self.toggle_optimizer(optimizer)
            loss = self.net(batch[0], attention_mask=batch[1], labels=batch[0]).loss
            self.log("loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            held_now = {name: bool((linear.weight == 0).any()) for name, linear in prunable(self.net).items()}
            self.steps.append(sum(held_now.values()))
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        attention = [p for name, p in self.named_parameters() if "self_attn" in name]
        others = [p for name, p in self.named_parameters() if "self_attn" not in name]
        return [torch.optim.AdamW(attention, 1e-2), torch.optim.SGD(others, 1e-2, momentum=0.9)]


def test_manual_optimization(tmp_path):
    """Masks are held after each step of each optimizer."""
    lit, callback = Manual(), pruning(sparsity=0.5, at=4)
    trainer(tmp_path, [callback], max_steps=12).fit(lit, loader())
    assert lit.steps == [0] * 4 + [14] * 8
    assert all(parameter.requires_grad for parameter in lit.parameters())
    held(lit.state_dict(), callback, "net.")


def test_lora_in_the_module(tmp_path):
    """The base is frozen and pruned once; only the adapters learn."""
    lit = Plain(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])))
    before, callback = weights(lit), pruning(sparsity=0.5, at=2)
    trainer(tmp_path, [callback, checkpoints(tmp_path)]).fit(lit, loader())
    assert not any("base_layer" in name or "lora" in name for name in callback.masks)
    held(lit.state_dict(), callback, "net.base_model.model.")
    for name, value in lit.state_dict().items():
        assert torch.equal(value[value != 0], before[name][value != 0]) or "lora" in name, name
    again, other = Plain(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))), None
    other = pruning(sparsity=0.5, at=2)
    trainer(tmp_path, [other]).fit(again, loader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert same(weights(again), weights(lit))
    assert same(other.masks, callback.masks)


def test_conv1d(tmp_path):
    """GPT-2's weights lie the other way round, some of them square."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    lit, callback = Plain(GPT2LMHeadModel(config)), pruning(bh.Wanda(), 0.5, at=2)
    trainer(tmp_path, [callback, checkpoints(tmp_path)], max_steps=4).fit(lit, loader())
    held(lit.state_dict(), callback, "net.")
    assert all((mask.sum(0) == mask.shape[0] // 2).all() for mask in callback.masks.values())


def test_what_is_cut_and_repaired_keeps_its_zeros(files, tmp_path):
    lit, masks = module(), bh.WeightPruning(bh.Magnitude(), sparsity=0.5, at="start")
    cut = bh.StructuredPruning(bh.Amount(channels=0.25), importance=bh.importance.WeightNorm(), repair=bh.RepairConfig(), at=2)
    trainer(tmp_path, [masks, cut], 4).fit(lit, data(files))
    (event,) = cut.events
    assert "repaired" in event["what"]
    held(lit.state_dict(), masks)
    readers = [mask for name, mask in masks.masks.items() if name.endswith("down_proj")]
    assert readers
    assert all(0.3 < mask.float().mean() < 0.7 for mask in readers)
