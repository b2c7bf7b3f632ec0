"""Waits until a LightningModule has made its model, in `setup` or `configure_model`."""

from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from transformers import PreTrainedModel

from billhook.engine.state import Ambient

_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: pl.LightningModule, step: Callable[[], None]) -> None:
    """Takes a step at once where there is a Hugging Face model, else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model and optimizers are made.
    """
    if any(isinstance(one, PreTrainedModel) for one in pl_module.modules()):
        step()
        return
    own = vars(pl_module)
    if _WAITING not in own:
        own[_WAITING], own[_HOOK] = [], partial(_configure, pl_module, pl_module.configure_model)
    own[_WAITING].append(step)


def drop_waiting(pl_module: pl.LightningModule) -> None:
    """Drops the steps that still wait, and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: pl.LightningModule, configure: Callable[[], None]) -> None:
    """Makes the model, and takes the steps that wait for it."""
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_waiting(pl_module)
    before = Ambient.now()
    try:
        with torch.device("cpu"):  # Lightning has set a device and a dtype for new models
            Ambient(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()
