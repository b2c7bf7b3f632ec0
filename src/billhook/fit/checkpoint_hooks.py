"""Adds the shape, adapters and random numbers to the checkpoints of any LightningModule while our callbacks are in its fit."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from billhook.adapters.in_checkpoint import save_adapters
from billhook.fit.resume import ShapeInCheckpoint, before_weights, check_callbacks
from billhook.fit.resume_state import ResumeState, set_gradients, unfinished_gradients
from billhook.fit.shape_before import load_as_before, load_in_shape
from billhook.model.find import find_transformer
from billhook.model.shapes.checkpoint_shape import load_shape, save_shape
from billhook.model.shapes.shape import Shape, shape_of

RANDOM, GRADIENTS = "billhook_random", "billhook_gradients"
"""Where checkpoints keep the random numbers of each process, and the gradients of an unfinished step."""
_WRAPPED = "_billhook_wrapped"
_HOOKS = ("on_load_checkpoint", "on_save_checkpoint", "on_train_start", "on_train_epoch_start")


def wrap_hooks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Wraps the hooks of a module, once for all callbacks: the last ones before weights are loaded, and before training."""
    if _WRAPPED in pl_module.__dict__:
        return
    load, save, start, epoch = (getattr(pl_module, name) for name in _HOOKS)
    load_in_shape(trainer, pl_module)
    found, resume, gradients = _shape_now(pl_module), ResumeState(), dict[str, Tensor]()

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        trainer = pl_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(trainer, checkpoint)
            resume.load(checkpoint.get(RANDOM, []))
            gradients.update(checkpoint.get(GRADIENTS, {}))
        load_shape(pl_module, checkpoint, otherwise=found)
        if not isinstance(pl_module, ShapeInCheckpoint):
            before_weights(pl_module, trainer, checkpoint)
        load(checkpoint)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        add_to(pl_module.trainer, pl_module, checkpoint)
        save(checkpoint)

    def on_train_start() -> None:
        start()
        resume.begin_training(pl_module.trainer)
        set_gradients(pl_module, gradients)
        gradients.clear()

    def on_train_epoch_start() -> None:
        epoch()
        resume.begin_epoch(pl_module.trainer)

    wrapped: list[Callable[..., None]] = [on_load_checkpoint, on_save_checkpoint, on_train_start, on_train_epoch_start]
    pl_module.__dict__.update(zip(_HOOKS, wrapped, strict=True))
    pl_module.__dict__[_WRAPPED] = resume


def unwrap_hooks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ResumeState | None:
    """Restores a module's hooks; returns to the first callback the state that `add_to` needs for checkpoints saved later."""
    resume: ResumeState | None = pl_module.__dict__.pop(_WRAPPED, None)
    if resume is not None:
        resume.end(trainer)
        load_as_before(trainer)
        for name in _HOOKS:
            del pl_module.__dict__[name]
    return resume


def add_to(
    trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any], released: ResumeState | None = None
) -> None:
    """Adds all of it to a checkpoint; callbacks call it too, for checkpoints that are saved after the fit or an error."""
    save_shape(pl_module, checkpoint)
    save_adapters(find_transformer(pl_module), checkpoint)
    resume = pl_module.__dict__.get(_WRAPPED, released)
    if resume is not None and "optimizer_states" in checkpoint and RANDOM not in checkpoint:
        checkpoint[RANDOM] = resume.state(trainer)
        checkpoint |= {GRADIENTS: found} if (found := unfinished_gradients(trainer, pl_module)) else {}


def _shape_now(module: nn.Module) -> Shape | None:
    """Returns the shape of the model in a module; None where it is made later."""
    try:
        return shape_of(find_transformer(module))
    except ValueError:
        return None
