"""Gives a sharded model the shape that a checkpoint holds: FSDP2's strategy loads weights before any hook is called."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from billhook.engine.sharded_files import described, is_sharded_checkpoint
from billhook.engine.sharding import reshard
from billhook.fit.shards import reshaped
from billhook.model.find import find_transformer
from billhook.model.shapes.checkpoint_shape import load_shape
from billhook.model.shapes.shape import KEY, shape_of

_LOAD = "load_checkpoint"


def load_in_shape(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Has FSDP2's strategy load checkpoints into a model of their shape, until `load_as_before`; other strategies ask a hook."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and _LOAD not in vars(strategy):
        vars(strategy)[_LOAD] = partial(_load, trainer, pl_module, strategy.load_checkpoint)


def load_as_before(trainer: pl.Trainer) -> None:
    """Gives the strategy its own method again."""
    vars(trainer.strategy).pop(_LOAD, None)


def _load(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    load: Callable[..., dict[str, Any]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint as the strategy does, once model and optimizers have its shape."""
    held = _held(Path(trainer.strategy.broadcast(checkpoint_path)))
    if held is not None and not _has_shape(pl_module, held):
        reshard(pl_module)  # which a forward may have left gathered
        if trainer.state.fn != TrainerFn.FITTING:
            trainer.strategy.optimizers = []  # those of an earlier fit are of other parameters
        names = {own: name for name, own in pl_module.named_parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = [[names[own] for own in group["params"] if own in names] for group in groups]
        with reshaped(pl_module, (), gradients=False, in_turn=True):
            load_shape(pl_module, {KEY: held})
        now = dict(pl_module.named_parameters())
        for group, own in zip(groups, trained, strict=True):  # no step has been taken
            group["params"][:] = [now[name] for name in own if name in now]
    return load(checkpoint_path, weights_only=weights_only)


def _has_shape(pl_module: pl.LightningModule, held: Any) -> bool:  # noqa: ANN401 - what a file holds
    """Tells whether the model has the shape that a checkpoint says already, so that nothing is to be gathered."""
    return isinstance(held, dict) and shape_of(find_transformer(pl_module)).to_dict() == held.get("shape")


def _held(path: Path) -> Any:  # noqa: ANN401
    """Returns what a checkpoint, a file or a folder of shards, says of its model; None of one that Lightning is to refuse."""
    try:
        sharded = is_sharded_checkpoint(path)
        checkpoint = described(path) if sharded else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return None
    return checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
