"""Events that change tensor shapes in the middle of a fit: model, optimizers, DDP and compiled code follow."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from billhook.engine.fsdp import WRAPPED, class_of
from billhook.engine.sharding import sizes_only
from billhook.fit.event import Event, EventCallback, LengthSetter, ShapeFollower, log_event
from billhook.fit.lightning_internals import averaging_callbacks, communication_state
from billhook.fit.ranks import fail_together
from billhook.fit.run import callbacks_of, check_reshaping_strategy, once_model_exists, training_steps
from billhook.fit.shards import gathered
from billhook.model.surgery import check_replaceable, check_unhooked


class ShapeCallback(EventCallback):
    """Changes tensor shapes at given steps of a fit."""

    moves_weights = False  # between events, too
    cuts_tensors = True  # by name, instead of dropping modules
    blockwise = False  # whether its events need one block of a sharded model whole at a time, and not all of it

    @abstractmethod
    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Raises `ValueError` if an event cannot happen; called once the model exists, before checkpoints are loaded."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes in the middle of the fit."""
        return False

    def shape_steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """Returns the steps at which shapes change; -1 for before the optimizer exists."""
        return sorted(self.steps(total, trainer))

    def check_trainer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses strategies, and averages of weights, that cannot follow."""
        name, averaging = type(self).__name__, averaging_callbacks(trainer)
        check_reshaping_strategy(trainer, name)
        if averaging and not self.only_at_start:
            raise ValueError(
                f"{name} changes shapes when the fit is under way, which {type(averaging[0][0]).__name__} cannot follow: prune "
                "or convert first and train the result, or use KVHeadConversion(at='start') without calibration"
            )
        if early := [type(callback).__name__ for callback, copy in averaging if copy is not None]:
            raise ValueError(f"{name} must stand before {early[0]} in the list of callbacks, which has already copied the model")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adds the shape to checkpoints, and checks trainer and model."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for callback in callbacks_of(trainer, LengthSetter):
                callback.set_length(trainer)  # even if it is later in the list
            once_model_exists(pl_module, partial(self._begin_unwrapped, trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what a `configure_model` has wrapped, and optimizers that cannot follow; carries out what is due by then."""
        self._refuse_wrapped(pl_module)
        if not self.only_at_start:
            check_no_hidden_state(trainer, pl_module, type(self).__name__)
            check_replaceable(pl_module, trainer.optimizers, type(self).__name__)
            if self.cuts_tensors:
                check_unhooked(dict(pl_module.named_parameters()))
        super().on_train_start(trainer, pl_module)

    def _begin_unwrapped(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_wrapped(pl_module)
        self.begin(trainer, pl_module)

    def _refuse_wrapped(self, module: nn.Module) -> None:
        if self.cuts_tensors:
            check_unwrapped(module, type(self).__name__)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the model once it exists."""
        with sizes_only(pl_module):
            self.check(pl_module, trainer)

    def apply_change(self, trainer: pl.Trainer, pl_module: pl.LightningModule, change: Callable[[list[Optimizer]], str]) -> Event:
        """Carries out a change as an event of its own, measured before and after, and logged; returns the event."""
        event = self.reshape(trainer, pl_module, self.validate(trainer, pl_module), change)
        event["after"] |= self.validate(trainer, pl_module)
        log_event(trainer, event)
        return event

    def reshape(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        metrics: dict[str, float],
        change: Callable[[list[Optimizer]], str],
    ) -> Event:
        """Carries out a change of model and optimizers, also where DDP has wrapped the model; see `record_event`."""
        with unwrapped(trainer, self.blockwise), fail_together(trainer, type(self).__name__):
            event = self.record_event(trainer, pl_module, metrics, partial(change, trainer.optimizers))
        for callback in callbacks_of(trainer, ShapeFollower):
            callback.follow()
        torch.compiler.reset()  # torch stops compiling after so many shapes
        return event


@contextmanager
def unwrapped(trainer: pl.Trainer, blockwise: bool = False) -> Iterator[None]:
    """Drops DDP, whose hooks are on the old parameters, and wraps the model again afterwards; takes FSDP2 off, and puts it on.

    What was sharded is whole meanwhile, or if that is enough, a block at a time.
    """
    module, wrapped = trainer.lightning_module, isinstance(trainer.strategy.model, DistributedDataParallel)
    if wrapped:
        trainer.strategy.model = module
    if module.automatic_optimization:  # which makes new gradients before it takes the next step
        module.zero_grad()
    with gathered(module, trainer.optimizers, gradients=not module.automatic_optimization, blockwise=blockwise):
        yield
    if wrapped:
        assert isinstance(trainer.strategy, DDPStrategy)
        trainer.strategy.configure_ddp()  # the same processes and settings, new buckets and hooks
        if isinstance(state := communication_state(trainer), PowerSGDState):
            _restart(state)


def check_no_hidden_state(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
    """Refuses optimizers and averages that a module or a callback keeps by itself, which nothing would have follow."""
    for holder in [pl_module, *callbacks_of(trainer, Callback)]:
        attributes = vars(holder) | (dict(pl_module.named_modules()) if holder is pl_module else {})
        for attr, kept in attributes.items():
            if isinstance(kept, AveragedModel):
                raise ValueError(
                    f"{name} changes shapes when the fit is under way, which {type(holder).__name__}.{attr}, an AveragedModel, "
                    "cannot follow: prune or convert first and train the result"
                )
    known = {id(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
    for attr, kept in vars(pl_module).items():
        if isinstance(kept, Optimizer) and any(id(group["params"]) not in known for group in kept.param_groups):
            raise ValueError(
                f"{name}: {type(pl_module).__name__}.{attr} is a {type(kept).__name__} that configure_optimizers does not "
                "return, so that it would go on with parameters that have been replaced: return it there"
            )


def check_unwrapped(module: nn.Module, name: str) -> None:
    """Refuses a model in which torch's `checkpoint_wrapper` or `offload_wrapper` renames weights."""
    for where, part in module.named_modules():
        if WRAPPED in part._modules:
            raise ValueError(
                f"{name}: {where} is wrapped by torch's {class_of(part).__name__}, which renames its weights, so that it "
                "cannot cut them: let the model recompute activations by itself, as by activation_checkpointing_enable(), once "
                "called gradient_checkpointing_enable()"
            )


def _restart(state: PowerSGDState) -> None:
    """Drops the gradients that PowerSGD keeps by their place in DDP's buckets, which change in the first two steps."""
    state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))
    for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        kept.clear()


def check_no_shape_changes(
    trainer: pl.Trainer, mine: EventCallback, after: int, before: int, what: str, why: Callable[[ShapeCallback], str | None]
) -> None:
    """Refuses other callbacks that change shapes between two events of one; at one step their order in the list decides.

    Args:
        trainer: The trainer.
        mine: The callback.
        after: The step of its first event.
        before: The step of its last event.
        what: A phrase that says what the first event did.
        why: Returns a phrase that says why another callback cannot change shapes; None if it can.
    """
    total, seen = training_steps(trainer), False
    for callback in callbacks_of(trainer, EventCallback):
        seen |= callback is mine
        if callback is mine or not isinstance(callback, ShapeCallback) or (reason := why(callback)) is None:
            continue
        if steps := [step for step in callback.shape_steps(total, trainer) if (after, False) < (step, seen) < (before, True)]:
            raise ValueError(
                f"{type(callback).__name__} changes shapes at step {steps[0]}, after {type(mine).__name__} has {what} at step "
                f"{after}{reason}: let it come first, at an earlier step or before it in the list of callbacks"
            )
