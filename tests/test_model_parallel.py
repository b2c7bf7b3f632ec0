"""FSDP2 on the CPU: two processes under ModelParallelStrategy, started as in test_ddp, which fit one trainer after another."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from families import llama
from fits import data, module, same, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from test_ddp import run_script
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import billhook as bh
from billhook.checkpoints.export import export_checkpoint
from billhook.fit.measure import measure
from billhook.model.linears import prunable
from billhook.running.shards import is_sharded, whole

SCRIPT = """
import os
os.environ["PYTHONHASHSEED"] = "4"
from test_model_parallel import fit_all
fit_all()
"""


def gpt2():
    """Its linears are Conv1D, its embeddings tied."""
    small = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **dropout))


class Own(pl.LightningModule):
    """A user's own module, which shards blocks and what is around them, or all as one."""

    def __init__(self, model=llama, blocks=True, policy=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = model().train()
        self.blocks, self.policy = blocks, policy or MixedPrecisionPolicy()

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.net):
            layers = next(m for m in self.net.modules() if isinstance(m, torch.nn.ModuleList)) if self.blocks else ()
            for part in [*layers, self.net]:
                fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=self.policy)

    def train_dataloader(self):
        ids, ranks = torch.randint(3, 60, (12, 12), generator=torch.Generator().manual_seed(0)), self.trainer.world_size
        sampler = DistributedSampler(ids, ranks, self.trainer.global_rank, shuffle=False) if ranks > 1 else None
        return DataLoader(TensorDataset(ids), 2 // ranks, sampler=sampler)

    val_dataloader = train_dataloader

    def training_step(self, batch, batch_idx):
        return self.net(batch[0], labels=batch[0]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0], labels=batch[0]).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Zeros(pl.Callback):
    """Whether what a WeightPruning has masked is zero after each step, on this rank's part of each weight."""

    def __init__(self, pruning):
        self.pruning, self.always = pruning, True

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {name: whole(value) for name, value in pl_module.state_dict().items()}
        self.always &= all(not state[f"net.{name}.weight"][~mask].any() for name, mask in self.pruning.masks.items())


class Looks(pl.Callback):
    """Validates before training, as Report does."""

    def on_train_start(self, trainer, pl_module):
        measure(trainer, pl_module, 1)


@dataclass(frozen=True)
class Fit:
    """What is done by one process, and by two on the same global batches."""

    module: Callable[[], pl.LightningModule]
    callback: Callable[[], Any]
    told: Callable[[Any], Any]  # of the callback, the same on both
    steps: int = 4

    def run(self, folder: Path, files: dict[str, str], ranks: int = 1, full: bool = True, path=None, checkpoints=()) -> Any:
        torch.manual_seed(0)
        lit, callback = self.module(), self.callback()
        zeros = Zeros(callback)
        text = isinstance(lit, bh.TransformerModule)
        two = {"devices": 2, "strategy": sharding(2, save_distributed_checkpoint=not full), "use_distributed_sampler": text}
        # a validation leaves gathered what is around the blocks
        often = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 2}
        callbacks = [Looks(), callback, *[zeros] * (not text), *checkpoints]
        run = trainer(folder, callbacks, max_steps=self.steps, **often, **(two if ranks == 2 else {}))
        run.fit(lit, data(files, batch_size=2 // ranks) if text else None, ckpt_path=path)
        state = {name: whole(value) for name, value in lit.state_dict().items()}
        return run, state, [zeros.always, self.told(callback)]


def sharding(data_parallel_size, tensor_parallel_size=1, **options):
    return ModelParallelStrategy(data_parallel_size, tensor_parallel_size, **options)


def masks(criterion, module=Own, **options):
    """With batches that two processes cannot share out evenly, or training examples."""
    given = {"at": 2, "examples": 3, "measure_batches": 1} | options
    given |= {} if "sparsity" in options or "pattern" in options else {"sparsity": 0.5}
    return Fit(module, lambda: bh.WeightPruning(criterion, **given), lambda one: [one.masks, one.events])


ONE = [(torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(3)),)]
RAMP = bh.Linear(final=0.5, start=1, end=3)
MASKS = {
    "magnitude": masks(bh.Magnitude(), sparsity=RAMP, at="start"),
    "magnitude, global": masks(bh.Magnitude(compares="global")),
    "wanda": masks(bh.Wanda(), sparsity=RAMP, at="start"),
    "wanda, none": masks(bh.Wanda(), sequential="none", at="start"),
    "wanda, layer": masks(bh.Wanda(), sequential="layer", output_embeddings=True),
    "wanda, global": masks(bh.Wanda(compares="global"), sequential="none"),
    "wanda, 2:4": masks(bh.Wanda(), pattern="2:4"),
    "wanda, one batch": masks(bh.Wanda(), calibration=ONE),
    "wanda, as one": masks(bh.Wanda(), lambda: Own(blocks=False)),
    "wanda, Conv1D": masks(bh.Wanda(), lambda: Own(gpt2)),
    "owl": masks(bh.Wanda(), allocation=bh.OWL()),
    "sparsegpt": masks(bh.SparseGPT(), pattern="2:4"),
    "sparsegpt, bfloat16": masks(bh.SparseGPT(), lambda: Own(policy=MixedPrecisionPolicy(torch.bfloat16))),
}
HEADS = Fit(
    lambda: module(num_key_value_heads=8),
    lambda: bh.HeadPruning(bh.MultiStep([0.25, 0.5], [1, 2]), remove="never", measure_batches=0, examples=4),
    lambda one: [one.record.state_dict(), one.heads, one.events],
)
EVERYTHING = {"output_embeddings": True, "examples": 3, "measure_batches": 0}
RESUMED = {
    "masks": Fit(module, lambda: bh.WeightPruning(bh.Wanda(), RAMP, **EVERYTHING), lambda one: one.masks),
    "heads": Fit(module, lambda: bh.KVHeadConversion(2), lambda one: one.events),
    "heads masked": HEADS,
}


def fit_all() -> None:
    """What each of the two processes runs."""
    files, out = json.loads(sys.argv[1])
    out = Path(out)
    torch.set_num_threads(1)
    for name, one in MASKS.items():
        run, *result = one.run(out, files, ranks=2)
        keep(run, out / f"{name}.pt", result)
    for name, one in RESUMED.items():
        for full in (True, False):
            folder = out / f"{name}, {full}"
            saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
            run, *straight = one.run(out, files, 2, full, checkpoints=[saves])
            keep(run, out / f"{name}, {full}.pt", straight)
            for step in (1, 2):
                run, *resumed = one.run(out, files, 2, full, path=folder / f"step={step}.ckpt")
                keep(run, out / f"{name}, {full}, {step}.pt", resumed)
    export(files, out)
    refused = [str(refusal(files, out, callback)) for callback in (bh.WeightPruning(sparsity=0.5), bh.KVHeadConversion(2))]
    keep(run, out / "refused.pt", refused)


def export(files, out):
    callbacks = [bh.WeightPruning(sparsity=0.5, examples=3), bh.Export(str(out / "exported")), bh.Report(str(out / "plot.png"))]
    run = trainer(out, callbacks, max_steps=1, devices=2, strategy=sharding(2), limit_val_batches=1)
    run.fit(module(), data(files, batch_size=1))


def refusal(files, out, callback):
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 must be 1") as error:
        trainer(out, [callback], max_steps=2, devices=2, strategy=sharding(1, 2)).fit(module(), data(files, batch_size=1))
    return error.value


def keep(run, path, result):
    """Keeps what came of a fit, and whether it is the same on both ranks."""
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, repr(tree_map_only(torch.Tensor, torch.Tensor.tolist, result)))
    if run.is_global_zero:
        torch.save([gathered[0] == gathered[1], result], path)


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [files, str(folder)])
    return folder


@pytest.fixture
def of_two(fitted):
    def read(name):
        alike, result = torch.load(fitted / f"{name}.pt", weights_only=True)
        assert alike, "the ranks differ"
        return result

    return read


@pytest.mark.parametrize("name", MASKS)
def test_two_processes_prune_as_one_does(of_two, files, tmp_path, name):
    state, (always, (masks, events)) = of_two(name)
    _, single, (_, (masks_of_one, events_of_one)) = MASKS[name].run(tmp_path, files)
    assert always
    assert [e["after"]["sparsity"] for e in events] == [e["after"]["sparsity"] for e in events_of_one]
    assert masks.keys() == masks_of_one.keys()
    least = 0.97 if "bfloat16" in name else 0.99
    for own, mask in masks_of_one.items():
        assert (mask == masks[own]).float().mean() >= least, own
        if "wanda" in name and "global" not in name and "Conv1D" not in name:
            assert (mask.sum(1) == masks[own].sum(1)).all()
        both = mask & masks[own]
        values = [found[f"net.{own}.weight"] for found in (state, single)]
        assert not values[0][~masks[own]].any()
        torch.testing.assert_close(values[0][both], values[1][both], atol=0.05 if "bfloat16" in name else 2e-3, rtol=1e-2)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_straight_through(of_two, name, full, step):
    straight, resumed = of_two(f"{name}, {full}"), of_two(f"{name}, {full}, {step}")
    assert same(straight[0], resumed[0])
    assert str(straight[1]) == str(resumed[1])


@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
def test_zeros_are_in_the_checkpoint(of_two, fitted, full):
    _, (_, masks) = of_two(f"masks, {full}")
    path = fitted / f"masks, {full}" / "step=4.ckpt"
    assert path.is_file() == full
    state = torch.load(path, weights_only=True)["state_dict"] if full else read_sharded(path)
    assert len(masks) == 15
    for name, mask in masks.items():
        weight = state[f"model.{name}.weight"]
        assert not weight[~mask].any()
        assert weight[mask].all()


def read_sharded(path):
    dcp_to_torch_save(path, path / "whole.pt")
    return torch.load(path / "whole.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
def test_two_processes_convert_at_the_start_as_one_does(of_two, files, tmp_path, full):
    state, (_, events) = of_two(f"heads, {full}")
    _, single, (_, events_of_one) = RESUMED["heads"].run(tmp_path, files)
    assert events == events_of_one
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=2e-4, rtol=1e-3)


def test_a_full_checkpoint_loads_elsewhere(of_two, fitted, tmp_path):
    state, _ = of_two("heads, True")
    path = fitted / "heads, True" / "step=4.ckpt"
    lit = bh.TransformerModule.load_from_checkpoint(path, model=llama(vocab_size=2048))
    assert same(lit.state_dict(), state)
    export_checkpoint(path, tmp_path / "exported")
    assert bh.load(tmp_path / "exported").config.num_key_value_heads == 2


def test_two_processes_mask_the_heads_that_one_does(of_two, files, tmp_path):
    state, (_, (record, heads, events)) = of_two("heads masked, True")
    _, single, (_, (record_of_one, heads_of_one, events_of_one)) = HEADS.run(tmp_path, files)
    assert heads == heads_of_one
    assert sum(map(len, heads.values())) == 8
    assert events == events_of_one
    for own, scores in record_of_one["scores"].items():
        torch.testing.assert_close(record["scores"][own], scores, rtol=1e-3, atol=1e-5, equal_nan=True)
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=2e-4, rtol=1e-3)


def test_what_is_exported_loads(fitted):
    model = bh.load(fitted / "exported")
    assert type(model) is transformers.LlamaForCausalLM
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in prunable(model).values())


def test_tensor_parallel_is_refused(of_two):
    for message, name in zip(of_two("refused"), ("WeightPruning", "KVHeadConversion"), strict=True):
        assert message.startswith(f"{name} works where data is parallel, not where tensors are: tensor_parallel_size=2 must be 1")
        assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in message
