"""Fits under ModelParallelStrategy."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import billhook as bh
from billhook.engine.sharding import full_tensor, is_sharded
from billhook.fit.lightning import LightningFit
from kit import prunes
from kit.families import build, llama, recompute
from kit.fits import data, module, trainer


def gpt2():
    """Its linears are Conv1D, its embeddings tied."""
    small = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **dropout))


def mixtral():
    return build("mixtral")


def checkpointed():
    model = llama()
    recompute(model, {"use_reentrant": False})
    return model


class Own(pl.LightningModule):
    """A user's own module, which shards blocks and what is around them, or all as one."""

    def __init__(self, model=llama, blocks=True, policy=None, batch=2, nodes=1, rows=12, **sharded):
        super().__init__()
        torch.manual_seed(0)
        self.net = model().train()
        self.blocks, self.policy = blocks, policy or MixedPrecisionPolicy()
        self.batch, self.nodes, self.rows, self.sharded = batch, nodes, rows, sharded

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.net):
            layers = next(m for m in self.net.modules() if isinstance(m, torch.nn.ModuleList)) if self.blocks else ()
            mesh = self.device_mesh["data_parallel"]
            if self.nodes > 1:  # sharded within a node, and the same on each
                mesh = init_device_mesh("cpu", (self.nodes, mesh.size() // self.nodes), mesh_dim_names=("nodes", "ranks"))
            for part in [*layers, self.net]:
                fully_shard(part, mesh=mesh, mp_policy=self.policy, **self.sharded)

    def train_dataloader(self):
        ranks = self.trainer.world_size
        ids = torch.randint(3, 60, (self.rows, 12), generator=torch.Generator().manual_seed(0))
        sampler = DistributedSampler(ids, ranks, self.trainer.global_rank, shuffle=False) if ranks > 1 else None
        return DataLoader(TensorDataset(ids), self.batch // ranks, sampler=sampler)

    val_dataloader = train_dataloader

    def training_step(self, batch, batch_idx):
        given = batch if isinstance(batch, dict) else {"input_ids": batch[0], "labels": batch[0]}
        return self.net(**given).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0], labels=batch[0]).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Zeros(pl.Callback):
    """Whether what a WeightPruning has masked is zero after each step, on this rank's part of each weight."""

    def __init__(self, pruning):
        self.pruning, self.always = pruning, True

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {name: full_tensor(value) for name, value in pl_module.state_dict().items()}
        self.always &= all(not weight_in(state, name)[~mask].any() for name, mask in self.pruning.masks.items())


def weight_in(state, name):
    """The weight that a mask is for, in the state of an `Own`: of a linear, or of all experts."""
    return state.get(f"net.{name}", state.get(f"net.{name}.weight"))


class Looks(pl.Callback):
    """Validates before training, as Report does."""

    def on_train_start(self, trainer, pl_module):
        LightningFit(trainer, pl_module).validate(1)


@dataclass(frozen=True)
class Fit:
    """What is done by one process, and by two on the same global batches."""

    module: Callable[[], pl.LightningModule]
    callback: Callable[[], Any]
    told: Callable[[Any], Any]  # of the callback, the same on both
    steps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)  # of the trainer
    batch: int = 2  # rows of text, of all ranks

    def run(
        self, folder: Path, files: dict[str, str], ranks: int = 1, full: bool = True, path=None, checkpoints=(), options=None
    ) -> Any:
        torch.manual_seed(0)
        lit, callback = self.module(), self.callback()
        zeros = Zeros(callback)
        text = isinstance(lit, bh.TransformerModule)
        several = {"devices": ranks, "strategy": sharding(ranks, save_distributed_checkpoint=not full)}
        several |= {"use_distributed_sampler": text}
        # a validation leaves gathered what is around the blocks
        often = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 2}
        callbacks = [Looks(), callback, *[zeros] * (hasattr(callback, "masks") and not text), *checkpoints]
        more = self.options | (several if ranks > 1 else options or {})
        run = trainer(folder, callbacks, max_steps=self.steps, **often, **more)
        run.fit(lit, data(files, batch_size=self.batch // ranks) if text else None, ckpt_path=path)
        state = {name: full_tensor(value) for name, value in lit.state_dict().items()}
        return run, state, [zeros.always, self.told(callback)]


def sharding(data_parallel_size, tensor_parallel_size=1, **options):
    return ModelParallelStrategy(data_parallel_size, tensor_parallel_size, **options)


def shapes(callback, make=Own, **options):
    """With last steps that have no event, so that all optimizer state has been used since."""
    return Fit(make, callback, lambda one: one.events, 5, options)


RAMP = bh.schedules.Linear(final=0.5, start=1, end=3)
SOME = {"calibration": 6, "measure_batches": 1}
GIVEN = SOME | {"calibration": list(torch.randint(3, 60, (3, 1, 2, 12), generator=torch.Generator().manual_seed(5)))}
"""Batches, since gradients of other batches are others."""

WRITTEN = SOME | {"calibration": bh.Calibration(length=12, tokens=96), "at": "start"}
"""What the model writes before the first step, as it writes other text after steps whose sums are rounded otherwise."""


def masks(criterion, module=Own, **options):
    """With batches that two processes cannot share out evenly, or training examples."""
    given = {"at": 2, "calibration": 3, "measure_batches": 1} | options
    given |= {} if "sparsity" in options or "pattern" in options else {"sparsity": 0.5}
    return Fit(module, lambda: prunes.WeightPruning(criterion, **given), lambda one: [one.masks, one.events])


SHAPES = {
    "channels": shapes(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **SOME)),
    "heads in rounds, after masks": shapes(lambda: bh.HeadPruning(RAMP, remove="rounds", **SOME)),
    "blocks": shapes(lambda: bh.DepthPruning(1, at=2, **SOME)),
    "hidden dimensions": shapes(lambda: bh.StructuredPruning(bh.Amount(residual=0.25), at=2, **SOME)),
    "KV heads, of what it writes": shapes(lambda: bh.KVHeadConversion(2, method="svd", **WRITTEN)),
    "KV heads, in stages": shapes(lambda: bh.KVHeadConversion([4, 2], at=["start", 2], measure_batches=1)),
    "tied, Conv1D": shapes(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, **SOME), lambda: Own(gpt2)),
    "offloaded, computing in bfloat16": shapes(
        lambda: bh.KVHeadConversion(2, at=2, measure_batches=1),
        lambda: Own(policy=MixedPrecisionPolicy(torch.bfloat16), offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ),
    "experts": shapes(lambda: bh.StructuredPruning(bh.Amount(experts=0.25), at=2, repair=None, **SOME), lambda: Own(mixtral)),
    "channels of experts": shapes(
        lambda: bh.StructuredPruning(bh.Amount(channels=0.25), at=2, repair=None, **SOME), lambda: Own(mixtral)
    ),
    "as one": shapes(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **SOME), lambda: Own(blocks=False)),
}


class OfFirst:
    """Batches that the first of several ranks alone has."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        rank, ranks = 0, 1
        if torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return iter([one for one in self.batches for _ in range(ranks)] if rank == 0 else [])


LONGER = list(torch.randint(3, 60, (3, 1, 4, 12), generator=torch.Generator().manual_seed(5)))
"""Batches with tokens enough to repair by two of them."""


def lacking(of, **own):
    """What needs batches, of which a rank has none."""
    given = SOME | {"calibration": of, "at": 2}
    callbacks = {
        "by svd": lambda: bh.KVHeadConversion(2, method="svd", **given),
        "the best, repaired": lambda: bh.KVHeadConversion(2, method="auto", repair=bh.RepairConfig(), **given),
        "repaired": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), repair=bh.RepairConfig(), **given),
    }
    return {f"a rank without batches, {what}": shapes(one, partial(Own, **own)) for what, one in callbacks.items()}


SHAPES |= lacking(OfFirst(LONGER), batch=4)
MATCHED = bh.RepairConfig(match=bh.criteria.BlockMatching(steps=3))
LONG = SOME | {"calibration": list(torch.randint(3, 60, (6, 1, 4, 12), generator=torch.Generator().manual_seed(6))), "at": 2}
SHAPES |= {
    "channels, matched": shapes(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), repair=MATCHED, **LONG)),
    "blocks, matched": shapes(lambda: bh.DepthPruning(1, last=1, repair=MATCHED, **LONG)),
    "KV heads, matched": shapes(lambda: bh.KVHeadConversion(2, method="svd", repair=MATCHED, **LONG)),
}


ONE = [(torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(3)),)]


MASKS = {
    "magnitude": masks(bh.Magnitude(), sparsity=RAMP, at="start"),
    "magnitude, global": masks(bh.Magnitude(compares="global")),
    "wanda": masks(bh.Wanda(), sparsity=RAMP, at="start"),
    "wanda, layer": masks(bh.Wanda(), sequential="layer", output_embeddings=True),
    "wanda, global": masks(bh.Wanda(compares="global"), sequential="none"),
    "wanda, of what it writes": masks(bh.Wanda(), **WRITTEN),
    "wanda, 2:4": masks(bh.Wanda(), pattern="2:4"),
    "wanda, one batch": masks(bh.Wanda(), calibration=ONE),
    "wanda, Conv1D": masks(bh.Wanda(), lambda: Own(gpt2)),
    "wanda, experts": masks(bh.Wanda(), lambda: Own(mixtral)),
    "owl": masks(bh.Wanda(), allocation=bh.criteria.OWL()),
    "wanda, matched": masks(bh.Wanda(), match=bh.criteria.BlockMatching(), calibration=6),
    "sparsegpt": masks(bh.SparseGPT(), pattern="2:4"),
    "sparsegpt, bfloat16": masks(bh.SparseGPT(), lambda: Own(policy=MixedPrecisionPolicy(torch.bfloat16))),
}


HEADS = Fit(
    lambda: module(num_key_value_heads=8),
    lambda: bh.HeadPruning(bh.schedules.MultiStep([0.25, 0.5], [1, 2]), remove="never", measure_batches=0, calibration=4),
    lambda one: [vars(one.record), one.heads, one.events],
)


EVERYTHING = {"output_embeddings": True, "calibration": 3, "measure_batches": 0}


STEPS = 1, 3
"""After which a fit is stopped: before an event, and after it."""
FEW = {"calibration": 6, "measure_batches": 0}


RESUMED = {
    "masks": (False, Fit(module, lambda: prunes.WeightPruning(bh.Wanda(), RAMP, **EVERYTHING), lambda one: one.masks)),
    "heads": (True, Fit(module, lambda: bh.KVHeadConversion(2), lambda one: one.events)),
    "heads masked": (True, HEADS),
}
"""Fits that are stopped, each with whether its checkpoints are full."""


def adapted():
    torch.manual_seed(0)
    return bh.TransformerModule(llama(vocab_size=2048), lr=1e-2, warmup=2, lora=bh.training.LoRA(r=2, dropout=0.0))


ADAPTED = Fit(
    adapted, lambda: prunes.WeightPruning(sparsity=RAMP, mask_adapters=True, **FEW), lambda one: [one.masks, one.events], steps=5
)
"""With LoRA that counts and is masked; it has learned something before the last round."""


def changed(callback):
    return Fit(module, callback, lambda one: one.events)


CHANGED = {
    "channels changed": (True, changed(lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **FEW))),
    "blocks changed": (False, changed(lambda: bh.DepthPruning(1, at=2, **FEW))),
    "KV heads changed": (True, changed(lambda: bh.KVHeadConversion([4, 2], at=["start", 2]))),
    "heads changed": (False, changed(lambda: bh.HeadPruning(RAMP, remove="rounds", **FEW))),
}
"""Fits whose shapes change on the way, each with whether its checkpoints are full."""


def fit_all() -> None:
    """What each of the two processes runs."""
    files, out, names = json.loads(sys.argv[1])
    out = Path(out)
    torch.set_num_threads(1)
    for name, one in (MASKS | SHAPES).items():
        if name in names:
            run, *result = one.run(out, files, ranks=2)
            keep(out / f"{name}.pt", result)
    for name, (full, one) in (RESUMED | CHANGED | {"adapted": (True, ADAPTED)}).items():
        if name in names:
            stop_and_resume(one, name, full, files, out)
    export(files, out)
    refused = [str(refusal(files, out, callback)) for callback in (bh.WeightPruning(sparsity=0.5), bh.KVHeadConversion(2))]
    keep(out / "refused.pt", refused)


def stop_and_resume(one, name, full, files, out):
    saves = ModelCheckpoint(out / name, "{step}", every_n_train_steps=1, save_top_k=-1)
    run, *straight = one.run(out, files, 2, full, checkpoints=[saves])
    keep(out / f"{name}.pt", straight)
    for step in STEPS:
        run, *resumed = one.run(out, files, 2, full, path=out / name / f"step={step}.ckpt")
        keep(out / f"{name}, {step}.pt", resumed)


def export(files, out):
    callbacks = [
        bh.WeightPruning(sparsity=0.5, calibration=3),
        bh.Export(str(out / "exported")),
        bh.Report(str(out / "plot.png")),
    ]
    run = trainer(out, callbacks, max_steps=1, devices=2, strategy=sharding(2), limit_val_batches=1)
    run.fit(module(), data(files, batch_size=1))


def refusal(files, out, callback):
    with pytest.raises(ValueError, match="does not support ModelParallelStrategy with these settings") as error:
        trainer(out, [callback], max_steps=2, devices=2, strategy=sharding(1, 2)).fit(module(), data(files, batch_size=1))
    return error.value


def keep(path, result):
    """Keeps what came of a fit, and whether it is the same on both ranks."""
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, repr(tree_map_only(torch.Tensor, torch.Tensor.tolist, result)))
    if torch.distributed.get_rank() == 0:
        torch.save([len(set(gathered)) == 1, result], path)
