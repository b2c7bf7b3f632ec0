"""Random numbers of a fit, and the place in loaders that do not save their own: a resumed fit continues from both."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from billhook.engine.noise import random_state, set_random_state
from billhook.fit.lightning_internals import batch_progress, data_fetcher, is_accumulating, training_loaders

State = dict[str, Any]


class ResumeState:
    """Random numbers as they are, and as they were when the epoch began, from which its order can be drawn again.

    A `DataLoader` that only shuffles draws its order with torch's own random numbers. Loaders with a `state_dict` know their
    place, and the sampler of a `DistributedSampler` is given the epoch.
    """

    def __init__(self) -> None:
        self._begun: State | None = None
        self._loaded: list[State] = []
        self._end: State | None = None

    def state(self, trainer: pl.Trainer) -> list[State]:
        """Returns the states of all processes; only of this one after an error, when the others may no longer exist."""
        own = {"now": self._end or random_state(trainer.strategy.root_device), "begun": self._begun}
        if trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED:
            return [own]
        states = [own] * trainer.world_size
        torch.distributed.all_gather_object(states, own)
        return states

    def end(self, trainer: pl.Trainer) -> None:
        """Keeps the random numbers for a checkpoint that is saved later."""
        self._end = random_state(trainer.strategy.root_device)

    def load(self, states: list[State]) -> None:
        """Keeps the states of all processes until training begins."""
        self._loaded = list(states)

    def begin_training(self, trainer: pl.Trainer) -> None:
        """Continues from the loaded states, if they are of as many processes."""
        loaded, self._loaded, self._begun = self._loaded, [], None
        if len(loaded) != trainer.world_size:
            return
        own, progress = loaded[trainer.global_rank], batch_progress(trainer)
        over = progress.is_last_batch
        begun = {"again": True, "random": own["now"]} if over else own["begun"]
        if begun is not None and _can_draw_again(trainer):
            set_random_state(begun["random"], trainer.strategy.root_device)
            if begun["again"]:
                _set_epoch(trainer)
                iter(data_fetcher(trainer))  # Lightning has made an iterator already, with other random numbers
            for _ in range(0 if over else progress.current.processed):
                next(data_fetcher(trainer).iterator)
            self._begun = begun
        if not over or self._begun is None:
            set_random_state(own["now"], trainer.strategy.root_device)

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Keeps the random numbers from which the order of an epoch will be drawn."""
        resuming = trainer.fit_loop.is_resuming
        if self._begun is not None and resuming:
            return  # drawn already
        again = trainer.current_epoch > 0 and not resuming
        lazy = all(getattr(loader, "num_workers", 0) == 0 for loader in training_loaders(trainer))
        known = _can_draw_again(trainer) and (again or lazy)
        self._begun = {"again": again, "random": random_state(trainer.strategy.root_device)} if known else None


def unfinished_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """Returns the gradients accumulated so far in an unfinished optimizer step; none with several processes."""
    batches = batch_progress(trainer).current
    if trainer.world_size > 1 or batches.ready != batches.processed or not is_accumulating(trainer):
        return {}
    return {name: own.grad for name, own in pl_module.named_parameters() if own.grad is not None}


def set_gradients(pl_module: pl.LightningModule, saved: dict[str, Tensor]) -> None:
    """Sets the gradients of an unfinished step."""
    for name, own in pl_module.named_parameters():
        if name in saved:
            own.grad = saved[name].to(own.device, own.dtype)


def _can_draw_again(trainer: pl.Trainer) -> bool:
    """Returns whether no loader knows its place, and none is read ahead to see where it ends."""
    loaders = training_loaders(trainer)
    return (
        bool(loaders) and data_fetcher(trainer).length is not None and not any(hasattr(one, "load_state_dict") for one in loaders)
    )


def _set_epoch(trainer: pl.Trainer) -> None:
    epochs: Any = trainer.fit_loop.epoch_progress.current
    for loader in training_loaders(trainer):
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epochs.processed)
