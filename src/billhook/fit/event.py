"""What callbacks share that change tensor shapes in the middle of a fit: when, on what, and how the training goes on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from billhook.fit.carry import carry, put, release
from billhook.fit.going_on import GoingOn
from billhook.fit.made import forget, when_made
from billhook.fit.measure import check_limit, measure
from billhook.fit.ranks import together
from billhook.fit.run import callbacks_of, is_search, is_trial, training_steps
from billhook.fit.strategies import check_shapes
from billhook.report.summary import summary
from billhook.schedules import Schedule, Step, check_step, resolve_step

At = Step | Literal["start"]
Event = dict[str, Any]


class FollowsShapes(Callback, ABC):
    """Keeps something in the sizes of the model's tensors, and is told when these have changed in the middle of a fit."""

    @abstractmethod
    def follow(self) -> None:
        """Takes the shape that the model has now."""


class SetsLength(Callback, ABC):
    """Sets the length of the fit, which others may need in their own `setup`."""

    @abstractmethod
    def settle(self, trainer: pl.Trainer) -> None:
        """Sets the length; asked for again, it changes nothing."""


class ShapeCallback(Callback, ABC):
    """Changes tensor shapes in one or more stages, each at its step; model, optimizers and checkpoints follow.

    Args:
        at: When each stage happens: a step (int), a fraction of training (float in 0..1), or `"start"` (before the optimizer
            exists); a schedule where a subclass says in its `steps` what that means.
        measure_batches: Validation batches on which the model is measured before and after each stage; by default as many
            as validation takes, 0 for none.

    Attributes:
        keeps_what_it_did: Whether its state says what it has done, so that a run cannot go on with another in its place.
        moves: Whether it moves weights between its events, too.
    """

    keeps_what_it_did = True
    moves = False

    def __init__(self, at: Sequence[At | Schedule], measure_batches: int | None = None) -> None:
        for moment in at:
            if moment != "start" and not isinstance(moment, Schedule):
                if isinstance(moment, str):
                    raise ValueError(
                        f"at={moment!r} must be 'start', an int (a step) or a float in 0..1 (a fraction of training)"
                    )
                check_step(moment, "at")
        check_limit(measure_batches)
        self.at, self.measure_batches = list(at), measure_batches
        self.events: list[Event] = []
        self._steps: list[int] = []
        self._last_step = 0
        self._released: GoingOn | None = None

    @abstractmethod
    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Raises `ValueError` if a stage that is not yet done cannot be."""

    @abstractmethod
    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Whether the model already has the shape that a stage, or a later one, leads to."""

    @abstractmethod
    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Carries out a stage and returns a phrase that says what was done."""

    @property
    def needs_length(self) -> bool:
        """Whether it depends on the length of training when shapes change."""
        return any(isinstance(moment, float | Schedule) for moment in self.at)

    @property
    def only_at_start(self) -> bool:
        """Whether no shape changes in the middle of the fit."""
        return all(moment == "start" for moment in self.at)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape; checks all stages; carries out those at the start."""
        if stage == "fit":
            check_shapes(trainer, pl_module, type(self).__name__, self.only_at_start)
        carry(pl_module)
        self._released = None
        if stage != "fit":
            return
        self._steps, self._last_step = [], 0
        if trainer.global_step == 0:  # otherwise the fit before goes on
            self.events = []
        _check_trainer(trainer, type(self).__name__, self.only_at_start)
        for one in callbacks_of(trainer, SetsLength):
            one.settle(trainer)  # also where it stands later in the list
        when_made(pl_module, partial(self._begin, trainer, pl_module))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks all stages, and carries out those at the start."""
        self.check(pl_module, trainer)
        others = [moment for callback in callbacks_of(trainer, type(self)) for moment in callback.at if moment != "start"]
        if is_trial(trainer) or (trainer.max_steps > 0 and trainer.max_epochs in (-1, None)):
            self.check_together(trainer, trainer.max_steps)
        elif others and "start" in self.at:
            raise ValueError(
                f"at={self.at}: 'start' beside later stages ({others}) needs a length that is known at the start: "
                "set max_steps alone, or give 0 in the place of 'start'"
            )
        for index, moment in enumerate(self.at):
            if moment == "start" and not is_search(trainer) and not self.is_done(pl_module, index):
                log_event(trainer, self._record(trainer, {}, pl_module, index, []))

    def steps(self, total_steps: int, trainer: pl.Trainer) -> list[int]:
        """The step of each stage, -1 for the start.

        Raises:
            ValueError: If one lies past the end of training, or two fall on one step.
        """
        # a fast_dev_run is there to try everything out in a step or two
        trial = is_trial(trainer)
        moments = [min(m, total_steps) if trial and isinstance(m, int) else m for m in self.at if not isinstance(m, Schedule)]
        steps = [-1 if moment == "start" else resolve_step(moment, total_steps, "at") for moment in moments]
        if not trial and len(set(steps)) < len(steps):
            raise ValueError(f"at={self.at}: two stages fall on one step ({steps} of {total_steps} steps)")
        return steps

    def check_together(self, trainer: pl.Trainer, total_steps: int) -> None:
        """Checks the stages of all callbacks of this kind.

        Raises:
            ValueError: If two fall on one step.
        """
        taken = [step for callback in callbacks_of(trainer, type(self)) for step in callback.steps(total_steps, trainer)]
        if not is_trial(trainer) and len(set(taken)) < len(taken):
            raise ValueError(f"two {type(self).__name__} fall on one step: their steps are {sorted(taken)}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns fractions of training into steps, and checks the stages."""
        total = self.length(trainer)
        self.check_together(trainer, total)
        self._steps = self.steps(total, trainer)

    def length(self, trainer: pl.Trainer) -> int:
        """Optimizer steps of the fit; where nothing bounds it, up to the last stage.

        Raises:
            ValueError: If a stage depends on the length, and it is not known.
        """
        total = training_steps(trainer)
        if total is not None:
            return total
        callbacks = callbacks_of(trainer, type(self))
        if any(callback.needs_length for callback in callbacks):
            raise ValueError(f"at={self.at} is in terms of training, whose length is not known: set max_steps")
        return max((m for callback in callbacks for m in callback.at if isinstance(m, int)), default=0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        if any(step == -1 and not self.is_done(pl_module, index) for index, step in enumerate(self._steps)):
            self.events = []  # a checkpoint of a run without this callback undid what was done at the start
        self._run(trainer, pl_module, after=-2)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Carries out what is due at the step that has just been taken."""
        if trainer.global_step != self._last_step:
            self._run(trainer, pl_module, after=self._last_step)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, after: int) -> None:
        self._last_step = trainer.global_step
        for index, step in sorted(enumerate(self._steps), key=lambda pair: pair[1]):
            if after < step <= trainer.global_step and not self.is_done(pl_module, index):
                self._happen(trainer, pl_module, index)

    def _happen(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int) -> None:
        limit = self.measure_batches
        before = {} if limit == 0 else measure(trainer, pl_module, limit)
        event = self._reshape(trainer, pl_module, stage, before)
        event["after"] |= {} if limit == 0 else measure(trainer, pl_module, limit)
        log_event(trainer, event)

    def _reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int, before: dict[str, float]) -> Event:
        """Carries out a stage on model and optimizers, also where DDP has wrapped the model."""
        with unwrapped(trainer), together(trainer, type(self).__name__):
            event = self._record(trainer, before, pl_module, stage, trainer.optimizers)
        for callback in callbacks_of(trainer, FollowsShapes):
            callback.follow()
        torch.compiler.reset()  # of code made for old shapes there may be so much that torch makes no more
        return event

    def _record(
        self, trainer: pl.Trainer, metrics: dict[str, float], model: nn.Module, stage: int, optimizers: list[Optimizer]
    ) -> Event:
        before = summary(model).numbers() | metrics
        what = self.change(model, stage, optimizers)
        event: Event = {"step": trainer.global_step, "what": what, "before": before, "after": {}}
        self.events.append(event)  # it has happened, whatever measuring comes to
        event["after"] |= summary(model).numbers()
        rank_zero_info(f"billhook, step {event['step']}: {what}")
        return event

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if training has ended before all stages."""
        late = [step for i, step in enumerate(self._steps) if step > trainer.global_step and not self.is_done(pl_module, i)]
        if late:
            name, what = type(self).__name__, "stage" if len(late) == 1 else f"{len(late)} stages up to that"
            rank_zero_warn(f"{name}: training has ended at step {trainer.global_step}, before the {what} at step {max(late)}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the shape into checkpoints that are saved after the fit or after an error, too."""
        put(trainer, pl_module, checkpoint, self._released)

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far; the shape itself is in the LightningModule's part of the checkpoint."""
        return {"events": self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events = state_dict["events"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the LightningModule as it was found."""
        self._released = release(trainer, pl_module) or self._released
        forget(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the LightningModule as it was found (Lightning does not call `teardown` then)."""
        self._released = release(trainer, pl_module) or self._released
        forget(pl_module)


@contextmanager
def unwrapped(trainer: pl.Trainer) -> Iterator[None]:
    """Drops DDP, which holds hooks on parameters as they were, and wraps the model again after."""
    wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
    if wrapped:
        trainer.strategy.model = trainer.strategy.lightning_module
    yield
    if wrapped:
        assert isinstance(trainer.strategy, DDPStrategy)
        trainer.strategy.configure_ddp()
        if isinstance(state := trainer.strategy._ddp_comm_state, PowerSGDState):
            _begin_anew(state)


def _begin_anew(state: PowerSGDState) -> None:
    """Forgets what PowerSGD keeps of gradients by their place in DDP's buckets, which are others in the first two steps."""
    state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))
    for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        kept.clear()


def _check_trainer(trainer: pl.Trainer, name: str, at_start: bool) -> None:
    averaging = [c for c in callbacks_of(trainer, Callback) if hasattr(c, "_average_model")]
    if averaging and not at_start:
        other = type(averaging[0]).__name__
        raise ValueError(
            f"{name} changes shapes when the fit is under way, which {other} cannot follow: prune or convert first and train the "
            "result, or use KVHeadConversion(at='start') without calibration"
        )
    if early := [type(c).__name__ for c in averaging if getattr(c, "_average_model", None) is not None]:
        raise ValueError(f"{name} must stand before {early[0]} in the list of callbacks, which has already copied the model")


def log_event(trainer: pl.Trainer, event: Event) -> None:
    """Gives every logger the figures of an event."""
    before, after = event["before"], event["after"]
    numbers = {key: after[key] for key in ("params", "kv_cache_bytes", "sparsity") if key in after}
    for key in sorted(before.keys() & after.keys() - {"params", "zeros", "kv_cache_bytes", "flops"}):
        numbers |= {f"{key}_before": before[key], f"{key}_after": after[key]}
    for logger in trainer.loggers:
        logger.log_metrics({key: float(value) for key, value in numbers.items() if value is not None}, step=event["step"])
