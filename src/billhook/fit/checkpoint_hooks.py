"""Checkpoint hooks: shape, adapters, random state, and position in the data."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from billhook.adapters.checkpoint import save_adapters
from billhook.engine import is_sharded_checkpoint, random_state, read_non_tensors, reshard, set_random_state
from billhook.engine.shards import gathered
from billhook.fit.lightning_internals import batch_progress, data_fetcher, is_accumulating, training_loaders
from billhook.fit.resume import ShapeInCheckpoint, callbacks_of, check_callbacks, prepare_for_weights
from billhook.model import KEY, Checkpoint, find_transformer, load_shape, save_shape, shape_of

RANDOM = "billhook_random"
GRADIENTS = "billhook_gradients"
"""Checkpoint keys of the random state of each process and the gradients of an unfinished step."""
_WRAPPED = "_billhook_wrapped"
_HOOKS = ("on_load_checkpoint", "on_save_checkpoint", "on_train_start", "on_train_epoch_start")
_LOAD = "load_checkpoint"
State = dict[str, Any]


class ResumeState:
    """Random state now and at the start of the epoch, from which the data order is reproduced.

    A `DataLoader` that only shuffles draws its order from torch's global random state. Loaders with a `state_dict` restore their
    own position, and a `DistributedSampler` depends on the epoch.
    """

    def __init__(self) -> None:
        self.loaded: list[State] = []  # of all processes, until training begins
        self.end: State | None = None  # for a checkpoint that is saved after training
        self._begun: State | None = None

    def state(self, trainer: Trainer) -> list[State]:
        """Returns the states of all processes, or of this process after an error."""
        mine = {"now": self.end or random_state(trainer.strategy.root_device), "begun": self._begun}
        if trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED:
            return [mine]
        states = [mine] * trainer.world_size
        torch.distributed.all_gather_object(states, mine)
        return states

    def begin_training(self, trainer: Trainer) -> None:
        """Restores the loaded states if the number of processes is the same."""
        loaded = self.loaded
        self.loaded = []
        self._begun = None
        if len(loaded) != trainer.world_size:
            return
        state = loaded[trainer.global_rank]
        progress = batch_progress(trainer)
        over = progress.is_last_batch
        begun = {"again": True, "random": state["now"]} if over else state["begun"]
        if begun is not None and _can_draw_again(trainer):
            set_random_state(begun["random"], trainer.strategy.root_device)
            if begun["again"]:
                epochs: Any = trainer.fit_loop.epoch_progress.current
                for loader in training_loaders(trainer):
                    sampler: Any = getattr(loader, "sampler", None)
                    if hasattr(sampler, "set_epoch"):
                        sampler.set_epoch(epochs.processed)
                iter(data_fetcher(trainer))  # Lightning has created an iterator from another random state
            for _ in range(0 if over else progress.current.processed):  # as in the uninterrupted run
                next(data_fetcher(trainer).iterator)
            self._begun = begun
        if not over or self._begun is None:
            set_random_state(state["now"], trainer.strategy.root_device)

    def begin_epoch(self, trainer: Trainer) -> None:
        """Stores the random state from which the epoch's order will be drawn."""
        resuming = trainer.fit_loop.is_resuming
        if self._begun is not None and resuming:
            return  # already drawn
        again = trainer.current_epoch > 0 and not resuming
        lazy = all(getattr(loader, "num_workers", 0) == 0 for loader in training_loaders(trainer))
        known = _can_draw_again(trainer) and (again or lazy)
        self._begun = {"again": again, "random": random_state(trainer.strategy.root_device)} if known else None


def _can_draw_again(trainer: Trainer) -> bool:
    """Returns whether the order can be drawn again: no stateful loaders and no read-ahead."""
    loaders = training_loaders(trainer)
    knows_end = data_fetcher(trainer).length is not None
    return bool(loaders) and knows_end and not any(hasattr(loader, "load_state_dict") for loader in loaders)


def wrap_hooks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Wraps a module's checkpoint and training hooks, once for all callbacks."""
    if _WRAPPED in pl_module.__dict__:
        return
    load, save, start, epoch = (getattr(pl_module, name) for name in _HOOKS)
    load_in_shape(trainer, pl_module)
    resume = ResumeState()
    gradients = {}
    try:
        shape = shape_of(find_transformer(pl_module))
    except ValueError:  # the model does not exist yet
        shape = None

    def on_load_checkpoint(checkpoint: Checkpoint) -> None:
        trainer = pl_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(callbacks_of(trainer), checkpoint.get("callbacks") or {})
            resume.loaded = checkpoint.get(RANDOM, [])
            gradients.update(checkpoint.get(GRADIENTS, {}))
        load_shape(pl_module, checkpoint, otherwise=shape)
        if not isinstance(pl_module, ShapeInCheckpoint):
            prepare_for_weights(pl_module, trainer, checkpoint)
        load(checkpoint)

    def on_save_checkpoint(checkpoint: Checkpoint) -> None:
        add_resume_state(pl_module.trainer, pl_module, checkpoint)
        save(checkpoint)

    def on_train_start() -> None:
        start()
        resume.begin_training(pl_module.trainer)
        for name, parameter in pl_module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device, parameter.dtype)
        gradients.clear()

    def on_train_epoch_start() -> None:
        epoch()
        resume.begin_epoch(pl_module.trainer)

    wrapped = [on_load_checkpoint, on_save_checkpoint, on_train_start, on_train_epoch_start]
    # on the instance: Lightning calls the module's hooks after those of callbacks, right before it loads weights or reads batches
    pl_module.__dict__.update(zip(_HOOKS, wrapped, strict=True))
    pl_module.__dict__[_WRAPPED] = resume


def unwrap_hooks(trainer: Trainer, pl_module: LightningModule) -> ResumeState | None:
    """Restores a module's hooks and returns their resume state, to the first caller only."""
    resume: ResumeState | None = pl_module.__dict__.pop(_WRAPPED, None)
    if resume is not None:
        resume.end = random_state(trainer.strategy.root_device)
        load_as_before(trainer)
        for name in _HOOKS:
            del pl_module.__dict__[name]
    return resume


def add_resume_state(
    trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint, released: ResumeState | None = None
) -> None:
    """Adds shape, adapters, random state, and gradients to a checkpoint."""
    save_shape(pl_module, checkpoint)
    save_adapters(find_transformer(pl_module), checkpoint)
    resume = pl_module.__dict__.get(_WRAPPED, released)
    if resume is not None and "optimizer_states" in checkpoint and RANDOM not in checkpoint:
        checkpoint[RANDOM] = resume.state(trainer)
        batches = batch_progress(trainer).current
        # between two batches of an unfinished step; with several processes, each has gradients of its own
        if trainer.world_size == 1 and batches.ready == batches.processed and is_accumulating(trainer):
            gradients = {name: parameter.grad for name, parameter in pl_module.named_parameters() if parameter.grad is not None}
            if gradients:
                checkpoint[GRADIENTS] = gradients


def load_in_shape(trainer: Trainer, pl_module: LightningModule) -> None:
    """Makes FSDP2's strategy restore shapes when loading; other strategies use a hook."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and _LOAD not in vars(strategy):
        vars(strategy)[_LOAD] = partial(_load, trainer, pl_module, strategy.load_checkpoint)


def load_as_before(trainer: Trainer) -> None:
    """Restores the strategy's own method."""
    vars(trainer.strategy).pop(_LOAD, None)


def _load(
    trainer: Trainer,
    pl_module: LightningModule,
    load: Callable[..., Checkpoint],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> Checkpoint:
    """Restores the shape of model and optimizers, then loads a checkpoint."""
    path = Path(trainer.strategy.broadcast(checkpoint_path))
    record: Any = None
    with suppress(Exception):  # an unreadable checkpoint has no shape
        if is_sharded_checkpoint(path):
            record = read_non_tensors(path).get(KEY)
        else:
            record = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(KEY)
    as_it_is = isinstance(record, dict) and shape_of(find_transformer(pl_module)).to_dict() == record.get("shape")
    if record is not None and not as_it_is:  # avoids gathering if the shape is the same
        reshard(pl_module)  # a forward pass may have left it gathered
        if trainer.state.fn != TrainerFn.FITTING:
            trainer.strategy.optimizers = []  # an earlier run's optimizers have other parameters
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        groups = []  # each with the names of its parameters
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                groups.append((group, [names[parameter] for parameter in group["params"] if parameter in names]))
        with gathered(pl_module, (), gradients=False, blockwise=True):
            load_shape(pl_module, {KEY: record})
        parameters = dict(pl_module.named_parameters())
        for group, group_names in groups:  # no optimizer state exists before the first step
            group["params"][:] = [parameters[name] for name in group_names if name in parameters]
    return load(checkpoint_path, weights_only=weights_only)
