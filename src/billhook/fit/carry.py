"""What checkpoints of any LightningModule carry while callbacks of ours are in its fit: the shape, adapters, random numbers."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from billhook.adapters.lora import save_adapters
from billhook.fit.going_on import GoingOn, gradients, set_gradients
from billhook.fit.resume import ShapeInCheckpoint, check_callbacks, take_over
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.find import find_transformer
from billhook.model.shape import Shape, shape_of

RANDOM, GRADIENTS = "billhook_random", "billhook_gradients"
"""Where checkpoints keep the random numbers of each process, and gradients that are not yet all there are of a step."""
_CARRIED = "_billhook_carried"
_HOOKS = ("on_load_checkpoint", "on_save_checkpoint", "on_train_start", "on_train_epoch_start")


def carry(pl_module: pl.LightningModule) -> None:
    """Wraps the module's hooks, once for all callbacks: its own are the last before weights are loaded, and before training."""
    if _CARRIED in pl_module.__dict__:
        return
    load, save, start, epoch = (getattr(pl_module, name) for name in _HOOKS)
    found, going_on, left = _shape_now(pl_module), GoingOn(), dict[str, Tensor]()

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        trainer = pl_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(trainer, checkpoint)
            going_on.load(checkpoint.get(RANDOM, []))
            left.update(checkpoint.get(GRADIENTS, {}))
        load_shape(pl_module, checkpoint, otherwise=found)
        if not isinstance(pl_module, ShapeInCheckpoint):
            take_over(pl_module, trainer, checkpoint)
        load(checkpoint)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        put(pl_module.trainer, pl_module, checkpoint)
        save(checkpoint)

    def on_train_start() -> None:
        start()
        going_on.begin_training(pl_module.trainer)
        set_gradients(pl_module, left)
        left.clear()

    def on_train_epoch_start() -> None:
        epoch()
        going_on.begin_epoch(pl_module.trainer)

    wrapped: list[Callable[..., None]] = [on_load_checkpoint, on_save_checkpoint, on_train_start, on_train_epoch_start]
    pl_module.__dict__.update(zip(_HOOKS, wrapped, strict=True))
    pl_module.__dict__[_CARRIED] = going_on


def release(trainer: pl.Trainer, pl_module: pl.LightningModule) -> GoingOn | None:
    """Leaves the module's hooks as they were.

    Returns:
        What `put` needs for checkpoints that are saved afterwards; None to all callbacks but the first that asks.
    """
    going_on: GoingOn | None = pl_module.__dict__.pop(_CARRIED, None)
    if going_on is not None:
        going_on.end(trainer)
        for name in _HOOKS:
            del pl_module.__dict__[name]
    return going_on


def put(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any], released: GoingOn | None = None) -> None:
    """Puts all that is carried into a checkpoint; callbacks do it too, for those that are saved after the fit or an error."""
    save_shape(pl_module, checkpoint)
    save_adapters(find_transformer(pl_module), checkpoint)
    going_on = pl_module.__dict__.get(_CARRIED, released)
    if going_on is not None and "optimizer_states" in checkpoint and RANDOM not in checkpoint:
        checkpoint[RANDOM] = going_on.state(trainer)
        checkpoint |= {GRADIENTS: found} if (found := gradients(trainer, pl_module)) else {}


def _shape_now(module: nn.Module) -> Shape | None:
    """The shape of the model in a module; None where it is made later."""
    try:
        return shape_of(find_transformer(module))
    except ValueError:
        return None
