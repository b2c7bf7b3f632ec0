"""Length, model creation, and record of a Lightning run."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel

from billhook.engine.state import TorchState
from billhook.private_paths import without_folders


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


def training_record(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the run's settings as `training` and last validation metrics as `metrics`."""
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # set by `seed_everything`, also in a parent process
    training = {
        "data": without_folders(data) if _names(data) else None,
        "seed": int(seed) if seed.isdigit() else None,
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
    }
    facts: dict[str, Any] = {"training": {name: value for name, value in training.items() if value is not None}}
    metrics = {}
    for name, value in trainer.callback_metrics.items():
        if name.startswith("val") and math.isfinite(number := float(value)):
            metrics[name] = number
    return facts | ({"metrics": metrics} if metrics else {})


def _names(data: object) -> bool:
    """Returns whether data is given by name, not as an object of `datasets`."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return isinstance(data, str) or (bool(parts) and all(_names(part) for part in parts))
