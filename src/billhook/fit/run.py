"""Length, random state, and model creation of a Lightning run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel

from billhook.engine.state import TorchState


def training_steps(trainer: pl.Trainer) -> int | None:
    """Returns the total number of optimizer steps; None if it is unknown."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # the module may take any number of steps per batch
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores random state afterward, also after an error, unlike Lightning's `isolate_rng`."""
    rng = isolate_rng()
    rng.__enter__()
    try:
        yield
    finally:
        rng.__exit__(None, None, None)  # without the exception, so that it restores


_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: pl.LightningModule, step: Callable[[], None]) -> None:
    """Calls `step` now if the model exists, or else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model, and optimizers are created.
    """
    if any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        step()
        return
    attributes = vars(pl_module)
    if _WAITING not in attributes:
        attributes[_WAITING], attributes[_HOOK] = [], partial(_configure, pl_module, pl_module.configure_model)
    attributes[_WAITING].append(step)


def drop_pending(pl_module: pl.LightningModule) -> None:
    """Drops pending calls and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: pl.LightningModule, configure: Callable[[], None]) -> None:
    """Creates the model and makes the pending calls."""
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_pending(pl_module)
    before = TorchState.now()
    try:
        with torch.device("cpu"):  # undoes the default device and dtype that Lightning sets for new models
            TorchState(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()
