"""FSDP2 in one process: what is refused before training, with the reason and the way out, and how much is gathered at a time."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

import billhook as bh
from billhook.engine.sharding import full_tensor, is_sharded
from billhook.sparsity.weight_plan import WeightPlan
from kit import prunes
from kit.families import llama
from kit.fits import data, module, trainer
from kit.losses import ALBERT
from kit.measured import MadeLate
from kit.sharding import GIVEN, Own, sharding


class First(pl.Callback):
    """Keeps the weights that the first step begins with."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found = {name: full_tensor(value).clone() for name, value in pl_module.state_dict().items()}


def albert():
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**ALBERT))


def is_whole(weight):
    return not isinstance(weight.data, DTensor) and weight.untyped_storage().size() > 0


def test_one_block_is_gathered_at_a_time(tmp_path, alone):
    lit, seen = Own(), []
    layers = lit.net.model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append([is_whole(own.mlp.up_proj.weight) for own in layers]))
    callback = bh.WeightPruning(bh.SparseGPT(), sparsity=0.5, calibration=2, measure_batches=0)
    trainer(tmp_path, [callback], max_steps=1, strategy=alone, limit_val_batches=0).fit(lit)
    assert len(seen) > 4
    assert all(here in ([True, False], [False, True]) for here in seen)


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT()], ids=str)
def test_an_event_that_fails_at_its_end_has_changed_nothing(tmp_path, alone, monkeypatch, criterion):
    def fails(*_):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(WeightPlan, "masks", fails)
    lit, callback = Own(), prunes.WeightPruning(criterion, 0.5, **GIVEN)
    with pytest.raises(MemoryError, match="no memory is left"):
        trainer(tmp_path, [callback], max_steps=1, strategy=alone, limit_val_batches=0).fit(lit)
    assert callback.events == []
    assert callback.masks == {}
    assert all(torch.equal(full_tensor(own), other) for own, other in zip(lit.parameters(), Own().parameters(), strict=True))


@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_blocks_are_matched_as_in_a_model_that_is_whole(tmp_path, alone, sequential):
    found = []
    for strategy in ("auto", alone):
        lit, kept = (
            Own(),
            prunes.WeightPruning(bh.Wanda(), 0.5, match=bh.criteria.BlockMatching(), sequential=sequential, **GIVEN),
        )
        first = First()
        trainer(tmp_path, [kept, first], max_steps=1, strategy=strategy, limit_val_batches=0).fit(lit)
        found.append(first.found)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_block_that_is_called_again_is_not_matched(tmp_path, alone):
    callback, lit = prunes.WeightPruning(bh.Wanda(), 0.5, match=bh.criteria.BlockMatching(), **GIVEN), Own(albert)
    with pytest.raises(ValueError, match=r"match: .* is called again after its block, or shares its weight"):
        trainer(tmp_path, [callback], max_steps=1, strategy=alone, limit_val_batches=0).fit(lit)


def test_weights_are_masked_in_a_model_that_is_made_late(tmp_path, alone):
    callback, lit = bh.WeightPruning(sparsity=0.5, calibration=2), MadeLate()
    trainer(tmp_path, [callback], max_steps=2, strategy=alone).fit(lit)
    assert not any(full_tensor(lit.net.get_parameter(f"{name}.weight"))[~mask].any() for name, mask in callback.masks.items())


def test_averaged_weights_are_refused(tmp_path, alone):
    callbacks = [bh.WeightPruning(sparsity=0.5), pl.callbacks.EMAWeightAveraging()]
    with pytest.raises(ValueError, match="cannot mask the copy of EMAWeightAveraging"):
        trainer(tmp_path, callbacks, max_steps=2, strategy=alone).fit(Own())


def test_layers_that_torch_recomputes_are_refused_before_training(tmp_path, alone):
    def wrapped():
        made = llama()
        for number, layer in enumerate(made.model.layers):
            made.model.layers[number] = checkpoint_wrapper(layer)
        return made

    run = trainer(tmp_path, [bh.KVHeadConversion(2, at=1, measure_batches=0)], max_steps=2, strategy=alone)
    with pytest.raises(ValueError, match=r"KVHeadConversion: net.model.layers.0 is wrapped by torch's CheckpointWrapper"):
        run.fit(Own(wrapped))
    assert run.global_step == 0


def test_a_module_that_an_earlier_fit_has_sharded_is_converted(tmp_path, alone):
    lit = Own()
    trainer(tmp_path, [], max_steps=1, strategy=alone).fit(lit)
    trainer(tmp_path, [bh.KVHeadConversion(2)], max_steps=1, strategy=sharding(1)).fit(lit)
    assert lit.net.config.num_key_value_heads == 2
    assert is_sharded(lit)


def test_an_event_that_is_to_polish_is_refused_before_the_first_step(tmp_path, alone):
    callback = bh.StructuredPruning(bh.Amount(channels=0.5), at=1, polish=bh.PolishConfig(steps=2), calibration=4)
    run = trainer(tmp_path, [callback], max_steps=2, strategy=alone, limit_val_batches=0)
    with pytest.raises(ValueError, match="polish: a streamed or sharded model cannot be polished.*billhook fit and distillation"):
        run.fit(Own())
    assert run.global_step == 0
    assert callback.events == []


LATER = {
    "blocks": lambda **given: bh.DepthPruning(1, at=2, **given),
    "channels": lambda **given: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, repair=None, **given),
}


@pytest.mark.parametrize("name", LATER)
def test_masks_follow_shapes_that_change_later(tmp_path, alone, name):
    masks, lit = prunes.WeightPruning(bh.Magnitude(), 0.5, at=1, skip=["model.layers.0.*"], measure_batches=0), Own()
    callbacks = [masks, LATER[name](calibration=4, measure_batches=0)]
    trainer(tmp_path, callbacks, max_steps=4, strategy=alone, limit_val_batches=0).fit(lit)
    last = lit.net.model.layers[-1]
    zeros = [(full_tensor(part.weight) == 0).float().mean() for part in last.modules() if isinstance(part, torch.nn.Linear)]
    assert len(masks.masks) == len(zeros) == 7
    assert all(0.4 < share < 0.6 for share in zeros)


def test_a_model_that_is_made_late_is_converted_at_the_start(tmp_path, alone):
    lit = MadeLate()
    trainer(tmp_path, [bh.KVHeadConversion(2)], max_steps=2, strategy=alone).fit(lit)
    assert lit.net.config.num_key_value_heads == 2
    assert is_sharded(lit)


SAVED = {"full": False, "sharded": True}
"""Kinds of checkpoints, each with what the strategy is told."""
CONVERTED = {
    "channels": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, calibration=4, measure_batches=0),
    "KV heads": lambda: bh.KVHeadConversion(2, at=1, measure_batches=0),
}


@pytest.mark.daily("channels-full", "KV heads-sharded")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.usefixtures("alone")
def test_a_converted_checkpoint_is_validated_by_a_dense_module(tmp_path, files, name, kind):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = partial(sharding, 1, save_distributed_checkpoint=SAVED[kind])
    run = trainer(tmp_path, [CONVERTED[name](), saves], max_steps=2, strategy=strategy(), limit_val_batches=2)
    lit = module()
    run.fit(lit, data(files, batch_size=2))
    assert (tmp_path / "step=2.ckpt").is_file() == (kind == "full")
    (straight,) = run.validate(lit, data(files, batch_size=2))
    other = trainer(tmp_path, [], strategy=strategy(), limit_val_batches=2)
    (again,) = other.validate(module(), data(files, batch_size=2), ckpt_path=tmp_path / "step=2.ckpt")
    assert again["val_loss"] == pytest.approx(straight["val_loss"])
    assert "load_checkpoint" not in vars(other.strategy)


@pytest.mark.parametrize("kind", [pl.strategies.FSDPStrategy, pl.strategies.DeepSpeedStrategy])
@pytest.mark.parametrize("callback", [lambda: bh.WeightPruning(sparsity=0.5), lambda: bh.KVHeadConversion(2)])
def test_other_ways_to_shard_are_refused(callback, kind):
    class Trainer:
        strategy = object.__new__(kind)  # DeepSpeed is not installed, FSDP1 not for the CPU
        global_step, callbacks, max_steps, max_epochs, limit_train_batches = 0, (), 8, None, 1.0

    one, lit = callback(), Own()
    with pytest.raises(
        ValueError, match=f"does not support {kind.__name__} with these settings. .*ModelParallelStrategy .*, or .* train"
    ):
        one.setup(Trainer(), lit, "fit")
    assert "on_save_checkpoint" not in vars(lit)


@pytest.mark.filterwarnings("ignore:.*the checkpoint", "ignore:You're resuming from a checkpoint")
def test_heads_that_a_checkpoint_has_masked_do_nothing_in_a_run_without_the_callback(tmp_path, alone):
    one, lit = bh.HeadPruning(0.5, remove="never", measure_batches=0, calibration=2), Own()
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, [one, saves], max_steps=1, strategy=alone, limit_val_batches=0).fit(lit)
    again, zeros = Own(), []
    look = pl.callbacks.LambdaCallback(on_train_start=lambda *_: zeros.append(heads_that_do_nothing(again)))
    keeps = bh.WeightPruning(bh.Magnitude(), sparsity=0.0, measure_batches=0)
    options = {"max_steps": 2, "strategy": sharding(1), "limit_val_batches": 0}
    trainer(tmp_path, [keeps, look], **options).fit(again, ckpt_path=tmp_path / "step=1.ckpt")
    assert zeros == [[4, 4]]


def heads_that_do_nothing(lit):
    read = [full_tensor(layer.self_attn.o_proj.weight).unflatten(1, (8, -1)) for layer in lit.net.model.layers]
    return [int((weight == 0).all(2).all(0).sum()) for weight in read]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_weights_of_another_shape_are_loaded(tmp_path, alone, files):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [bh.DepthPruning(1, at=2, calibration=4, measure_batches=0), bh.KVHeadConversion(2, at=2), saves]
    run = trainer(tmp_path, callbacks, max_steps=2, strategy=alone, limit_val_batches=2)
    lit = module(num_hidden_layers=3)
    run.fit(lit, data(files, batch_size=2))
    (after,) = run.validate(lit, data(files, batch_size=2))
    run.validate(lit, data(files, batch_size=2), ckpt_path=tmp_path / "step=1.ckpt")
    assert [len(lit.model.model.layers), lit.model.config.num_key_value_heads] == [3, 4]
    (again,) = run.validate(lit, data(files, batch_size=2), ckpt_path=tmp_path / "step=2.ckpt")
    assert again["val_loss"] == pytest.approx(after["val_loss"])
