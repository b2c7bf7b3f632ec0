"""Waits until a LightningModule has made its model, in `setup` or `configure_model`."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.running.undisturbed import Ambient

_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: pl.LightningModule, step: Callable[[], None]) -> None:
    """Takes a step at once where there is a Hugging Face model, else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model and optimizers are made.
    """
    if _has_model(pl_module):
        step()
        return
    if _WAITING not in pl_module.__dict__:
        pl_module.__dict__[_WAITING] = []
        pl_module.__dict__[_HOOK] = _then(pl_module, pl_module.configure_model)
    pl_module.__dict__[_WAITING].append(step)


def drop_waiting(pl_module: pl.LightningModule) -> None:
    """Drops the steps that still wait, and restores the module's hook."""
    if pl_module.__dict__.pop(_WAITING, None) is not None:
        del pl_module.__dict__[_HOOK]


def _then(pl_module: pl.LightningModule, configure: Callable[[], None]) -> Callable[[], None]:
    def configure_model() -> None:
        configure()
        steps = pl_module.__dict__[_WAITING]
        drop_waiting(pl_module)
        before = Ambient.now()
        try:
            with torch.device("cpu"):  # Lightning has set a device and a dtype for new models
                Ambient(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
                for step in steps:
                    step()
        finally:
            before.restore()

    return configure_model


def _has_model(module: nn.Module) -> bool:
    return any(isinstance(one, PreTrainedModel) for one in module.modules())
