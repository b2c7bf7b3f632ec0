"""Fits that prune heads."""

import lightning.pytorch as pl
import torch

import billhook as bh
from billhook.model.find import find_transformer
from billhook.units.find import find_units
from billhook.units.gates import Gate
from kit import fits
from kit.families import llama

LAYERS = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]


def module(seed=0, **changes):
    """Two layers of eight heads."""
    return fits.module(seed, **{"num_key_value_heads": 8} | changes)


def pruning(*args, **options):
    """A callback by flat arguments: those of `HeadOptions` and `StopWhenWorse`, too."""
    chosen = {name: options.pop(name) for name in ("ranking", "per", "min_heads", "normalize") if name in options}
    stop = {name: options.pop(name) for name in ("monitor", "keep", "mode") if name in options}
    options = {"calibration": 6, "measure_batches": 0} | options
    return bh.HeadPruning(*args, options=bh.HeadOptions(**chosen), stop=bh.StopWhenWorse(**stop) if stop else None, **options)


def transformer(lit):
    return find_transformer(lit)


def gates(lit):
    return [hook for part in transformer(lit).modules() for hook in part._forward_pre_hooks.values() if isinstance(hook, Gate)]


def acting(lit):
    """How many heads there are and act."""
    model, reads = transformer(lit), (".o_proj", ".attention.output.dense", ".self_attention.dense")
    width = sum(part.weight.shape[1] for name, part in model.named_modules() if name.endswith(reads))
    there = width // {"llama": 4, "bert": 8, "bloom": 8}[model.config.model_type]
    return there - sum(int((hook.values == 0).sum()) for hook in gates(lit))


def silent(lit, per="head"):
    """How many heads there are that nothing reads."""
    model, number = transformer(lit), 0
    for one in find_units(model, "head").values():
        for reader in one.readers:
            module = model.get_submodule(reader)
            dead = (module.weight == 0).all(0)
            number += sum(bool(dead[one.positions(per) == head].all()) for head in range(one.count(per)))
    return number


def bare(lit):
    """Nothing of the callback is left."""
    module_hooks = (hooks for part in lit.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks))
    return not any(module_hooks) and not {"log", "on_save_checkpoint", "on_load_checkpoint"} & vars(lit).keys()


class Acting(pl.Callback):
    """How many heads act at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(acting(pl_module))


REMOVE = ["never", "end", "rounds"]


class Scripted(bh.TransformerModule):
    """Validation that says which share of the heads acts."""

    def validation_step(self, batch, batch_idx):
        share = acting(self) / 16
        self.log_dict({"val_share": share, "val_debt": share - 1.5, "val_cost": 1 / share, "val_nan": float("nan")})


def scripted(seed=0):
    torch.manual_seed(seed)
    return Scripted(llama(vocab_size=2048, num_key_value_heads=8), lr=1e-2, warmup=2)
