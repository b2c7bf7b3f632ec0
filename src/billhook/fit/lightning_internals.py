"""Private and undocumented names of Lightning, used only in this file.

`tests/fit/test_lightning_internals.py` checks that each of them still exists.
"""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.optim.swa_utils import AveragedModel

from billhook.fit.fit import Averages


def forks_or_spawns(trainer: Trainer) -> bool:
    """Returns whether processes are forked or spawned and return only weights."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def averaging_callbacks(trainer: Trainer) -> Averages:
    """Returns callbacks that average weights, each with its copy of the model, if it exists."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    copies = [(callback, callback._average_model) for callback in callbacks if hasattr(callback, "_average_model")]
    return [(callback, copy.module if isinstance(copy, AveragedModel) else copy) for callback, copy in copies]


def is_tuning(trainer: Trainer) -> bool:
    """Returns whether a `Tuner` runs this to find a learning rate or a batch size."""
    return any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def communication_state(trainer: Trainer) -> object:
    """Returns the state of DDP's communication hook."""
    return getattr(trainer.strategy, "_ddp_comm_state", None)


def to_device(trainer: Trainer, batch: Any, loader: int = 0) -> Any:  # noqa: ANN401
    """Converts and moves a batch as Lightning does before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


def validation_loaders(trainer: Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's `CombinedLoader` for validation; None without validation."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        loop.setup_data()
    return loop._combined_loader


def is_sequential(loaders: Any) -> bool:  # noqa: ANN401
    """Returns whether a `CombinedLoader` reads its loaders sequentially."""
    return bool(loaders._mode == "sequential")


def training_loaders(trainer: Trainer) -> list[Any]:
    """Returns the training loaders; empty before they exist."""
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else list(loaders.flattened)


def drop_training_loaders(trainer: Trainer) -> None:
    """Makes Lightning create the training loaders again."""
    trainer.fit_loop._combined_loader = None


def logged_step(trainer: Trainer) -> int:
    """Returns the step at which Lightning logs its metrics now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def data_fetcher(trainer: Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's data fetcher; its `length` is None if it reads ahead."""
    return trainer.fit_loop._data_fetcher


def batch_progress(trainer: Trainer) -> Any:  # noqa: ANN401
    """Returns Lightning's counts of training batches: `current`, `total` and `is_last_batch`."""
    return trainer.fit_loop.epoch_loop.batch_progress


def is_accumulating(trainer: Trainer) -> bool:
    """Returns whether the next optimizer step needs more batches."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Returns the batch counts of the epoch in a checkpoint."""
    batches: dict[str, int] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return batches
