"""Private names of Lightning, and places in its loops that it does not document: they are used in this file alone.

`tests/fit/test_lightning_internals.py` checks that each of them still exists.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.optim.swa_utils import AveragedModel


def forks_or_spawns(trainer: pl.Trainer) -> bool:
    """Returns whether the fit runs in processes that give back nothing but weights."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def averaging_callbacks(trainer: pl.Trainer) -> list[tuple[Callback, nn.Module | None]]:
    """Finds the callbacks that average weights, each with its copy of the model, None before there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    copies = [(callback, callback._average_model) for callback in callbacks if hasattr(callback, "_average_model")]
    return [(callback, copy.module if isinstance(copy, AveragedModel) else copy) for callback, copy in copies]


def is_tuning(trainer: pl.Trainer) -> bool:
    """Returns whether a `Tuner` looks for a learning rate or a batch size in this fit, which it undoes afterwards."""
    return any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def communication_state(trainer: pl.Trainer) -> object:
    """Returns what the communication hook of DDP keeps between steps."""
    return getattr(trainer.strategy, "_ddp_comm_state", None)


def set_length(trainer: pl.Trainer, steps: int) -> None:
    """Sets how many optimizer steps the fit takes."""
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = steps, -1


def to_device(trainer: pl.Trainer, batch: Any, loader: int = 0) -> Any:  # noqa: ANN401
    """Converts and moves a batch as Lightning does before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


def validation_loaders(trainer: pl.Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's `CombinedLoader` of the validation; None where the run has no validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        loop.setup_data()
    return loop._combined_loader


def is_sequential(loaders: Any) -> bool:  # noqa: ANN401
    """Returns whether a `CombinedLoader` reads its loaders one after another."""
    return bool(loaders._mode == "sequential")


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Returns the loaders of the training, none before there are any."""
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else list(loaders.flattened)


def drop_training_loaders(trainer: pl.Trainer) -> None:
    """Has Lightning ask for the training loaders again."""
    trainer.fit_loop._combined_loader = None


def logged_step(trainer: pl.Trainer) -> int:
    """Returns the step under which Lightning logs now: the one that has just been taken counts once its figures are logged."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def initial_hyperparameters(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns what Lightning logs as hyperparameters of the module and of the data module, once it begins to fit."""
    owners = [owner for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)) if owner is not None]
    hyperparameters = {name: value for owner in owners if owner._log_hyperparams for name, value in owner.hparams_initial.items()}
    return {name: value for name, value in hyperparameters.items() if name != "_class_path"}


def data_fetcher(trainer: pl.Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's reader of the epoch: its `iterator`, and `length`, None where it reads ahead to see the end."""
    return trainer.fit_loop._data_fetcher


def batch_progress(trainer: pl.Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's counts of training batches: `current`, `total` and `is_last_batch`."""
    return trainer.fit_loop.epoch_loop.batch_progress


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Returns whether the next optimizer step needs more batches."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Returns the part of a checkpoint that says how many batches of the epoch have been used."""
    batches: dict[str, int] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return batches
