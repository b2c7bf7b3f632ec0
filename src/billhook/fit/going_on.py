"""Random numbers of a fit, and the place in loaders that cannot say it themselves: a resumed fit goes on with both."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from billhook.running.noise import random_state, set_random_state

State = dict[str, Any]


class GoingOn:
    """Where random numbers are and were when the pass over the data began, from which its order can be drawn again.

    That the order is drawn with torch's own random numbers is so for a `DataLoader` that shuffles and nothing else. Loaders with
    a `state_dict` know their place, and those of a `DistributedSampler` are told the epoch.
    """

    def __init__(self) -> None:
        self._begun: State | None = None
        self._loaded: list[State] = []
        self._end: State | None = None

    def state(self, trainer: pl.Trainer) -> list[State]:
        """The states of all processes; after an error the others may not be there any more."""
        own = {"now": self._end or random_state(trainer.strategy.root_device), "begun": self._begun}
        if trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED:
            return [own]
        states = [own] * trainer.world_size
        torch.distributed.all_gather_object(states, own)
        return states

    def end(self, trainer: pl.Trainer) -> None:
        """Keeps where random numbers are, for a checkpoint that is saved later."""
        self._end = random_state(trainer.strategy.root_device)

    def load(self, states: list[State]) -> None:
        """Takes the states of all processes, for when training begins."""
        self._loaded = list(states)

    def begin_training(self, trainer: pl.Trainer) -> None:
        """Goes on from what was loaded, if as many processes have saved it."""
        loaded, self._loaded, self._begun = self._loaded, [], None
        if len(loaded) != trainer.world_size:
            return
        own, loop = loaded[trainer.global_rank], _loop(trainer)
        over = loop.epoch_loop.batch_progress.is_last_batch
        begun = {"again": True, "random": own["now"]} if over else own["begun"]
        if begun is not None and _draws(loop):
            _set(trainer, begun["random"])
            if begun["again"]:
                _tell_epoch(loop)
                iter(loop._data_fetcher)  # Lightning has made an iterator already, with other random numbers
            for _ in range(0 if over else loop.epoch_loop.batch_progress.current.processed):
                next(loop._data_fetcher.iterator)
            self._begun = begun
        if not over or self._begun is None:
            _set(trainer, own["now"])

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Keeps where random numbers are from which the order of an epoch will be drawn."""
        loop = _loop(trainer)
        if self._begun is not None and loop.is_resuming:
            return  # drawn already
        again = trainer.current_epoch > 0 and not loop.is_resuming
        lazy = all(getattr(loader, "num_workers", 0) == 0 for loader in loop._combined_loader.flattened)
        known = _draws(loop) and (again or lazy)
        self._begun = {"again": again, "random": random_state(trainer.strategy.root_device)} if known else None


def gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """What batches have left of the gradients of a step of which others are to come; nothing on several processes."""
    loop = _loop(trainer).epoch_loop
    batches = loop.batch_progress.current
    if trainer.world_size > 1 or batches.ready != batches.processed or not loop._should_accumulate():
        return {}
    return {name: own.grad for name, own in pl_module.named_parameters() if own.grad is not None}


def set_gradients(pl_module: pl.LightningModule, saved: dict[str, Tensor]) -> None:
    """Goes on with gradients that were left."""
    for name, own in pl_module.named_parameters():
        if name in saved:
            own.grad = saved[name].to(own.device, own.dtype)


def _loop(trainer: pl.Trainer) -> Any:  # noqa: ANN401 - what of it is used Lightning keeps for itself
    return trainer.fit_loop


def _set(trainer: pl.Trainer, state: State) -> None:
    set_random_state(state, trainer.strategy.root_device)


def _draws(loop: Any) -> bool:  # noqa: ANN401
    """Whether no loader knows its place, and none is read ahead to see where it ends."""
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    return bool(loaders) and loop._data_fetcher.length is not None and not any(hasattr(one, "load_state_dict") for one in loaders)


def _tell_epoch(loop: Any) -> None:  # noqa: ANN401
    for loader in loop._combined_loader.flattened:
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(loop.epoch_progress.current.processed)
