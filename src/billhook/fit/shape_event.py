"""Events that change tensor shapes in model, optimizers, DDP, and FSDP2."""

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
    """A callback that changes tensor shapes at given steps."""

    moves_weights = False  # between events, too
    cuts_tensors = True  # by name, instead of dropping modules
    blockwise = False  # events need one gathered block of a sharded model at a time

    @abstractmethod
    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Raises `ValueError` if an event is impossible; called before checkpoints are loaded."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes during training."""
        return False

    def shape_steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """Returns the steps at which shapes change; -1 means before the optimizer exists."""
        return sorted(self.steps(total, trainer))

    def check_trainer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises `ValueError` if the strategy or weight averaging does not support shape changes."""
        name, averaging = type(self).__name__, averaging_callbacks(trainer)
        check_reshaping_strategy(trainer, name)
        if averaging and not self.only_at_start:
            raise ValueError(
                f"{name} changes shapes during training, which {type(averaging[0][0]).__name__} does not support. Prune or "
                "convert first and train the result, or use KVHeadConversion(at='start') without calibration."
            )
        if early := [type(callback).__name__ for callback, copy in averaging if copy is not None]:
            raise ValueError(f"{name} must be listed before {early[0]}, which has already copied the model.")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps checkpoint hooks and checks trainer and model."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for callback in callbacks_of(trainer, LengthSetter):
                callback.set_length(trainer)  # also if it is listed later
            once_model_exists(pl_module, partial(self._begin_unwrapped, trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks wrappers and optimizers, and applies events that are due before the first step."""
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
        """Applies a change as an event, measured before and after, and logs it."""
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
        """Applies a change of model and optimizers, also under DDP and FSDP2; see `record_event`."""
        with unwrapped(trainer, self.blockwise), fail_together(trainer, type(self).__name__):
            event = self.record_event(trainer, pl_module, metrics, partial(change, trainer.optimizers))
        for callback in callbacks_of(trainer, ShapeFollower):
            callback.follow()
        torch.compiler.reset()  # torch stops compiling after several shapes
        return event


@contextmanager
def unwrapped(trainer: pl.Trainer, blockwise: bool = False) -> Iterator[None]:
    """Unwraps DDP and FSDP2 within, because their hooks are on the old parameters.

    Within, sharded parameters are gathered: all of them, or with `blockwise`, one block at a time.
    """
    module, wrapped = trainer.lightning_module, isinstance(trainer.strategy.model, DistributedDataParallel)
    if wrapped:
        trainer.strategy.model = module
    if module.automatic_optimization:  # new gradients are computed before the next step
        module.zero_grad()
    with gathered(module, trainer.optimizers, gradients=not module.automatic_optimization, blockwise=blockwise):
        yield
    if wrapped:
        assert isinstance(trainer.strategy, DDPStrategy)
        trainer.strategy.configure_ddp()  # same settings, new buckets and hooks
        if isinstance(state := communication_state(trainer), PowerSGDState):
            _restart(state)


def check_no_hidden_state(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
    """Raises `ValueError` for optimizers and averaged models that Lightning does not know."""
    for holder in [pl_module, *callbacks_of(trainer, Callback)]:
        attributes = vars(holder) | (dict(pl_module.named_modules()) if holder is pl_module else {})
        for attr, value in attributes.items():
            if isinstance(value, AveragedModel):
                raise ValueError(
                    f"{name} changes shapes during training, which {type(holder).__name__}.{attr}, an AveragedModel, does not "
                    "support. Prune or convert first and train the result."
                )
    known = {id(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
    for attr, value in vars(pl_module).items():
        if isinstance(value, Optimizer) and any(id(group["params"]) not in known for group in value.param_groups):
            raise ValueError(
                f"{name} replaces parameters, but configure_optimizers does not return {type(pl_module).__name__}.{attr} "
                f"({type(value).__name__}), so it would keep the old ones. Return it from configure_optimizers."
            )


def check_unwrapped(module: nn.Module, name: str) -> None:
    """Raises `ValueError` if a torch wrapper renames weights."""
    for where, part in module.named_modules():
        if WRAPPED in part._modules:
            raise ValueError(
                f"{name}: {where} is wrapped by torch's {class_of(part).__name__}, which renames its weights. Use the model's "
                "own activation_checkpointing_enable(), formerly gradient_checkpointing_enable(), instead."
            )


def _restart(state: PowerSGDState) -> None:
    """Clears PowerSGD's state, because DDP's buckets change in the first two steps."""
    state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))
    for value in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        value.clear()


def check_no_shape_changes(
    trainer: pl.Trainer, mine: EventCallback, after: int, before: int, what: str, why: Callable[[ShapeCallback], str | None]
) -> None:
    """Raises `ValueError` if other callbacks change shapes between two events of a callback.

    At the same step, the order of callbacks decides.

    Args:
        trainer: The trainer.
        mine: The callback.
        after: Step of its first event.
        before: Step of its last event.
        what: Effect of the first event, for the message.
        why: Function that returns why another callback must not change shapes, for the message; None if it may.
    """
    total, seen = training_steps(trainer), False
    for callback in callbacks_of(trainer, EventCallback):
        seen |= callback is mine
        if callback is mine or not isinstance(callback, ShapeCallback) or (reason := why(callback)) is None:
            continue
        if steps := [step for step in callback.shape_steps(total, trainer) if (after, False) < (step, seen) < (before, True)]:
            raise ValueError(
                f"{type(callback).__name__} changes shapes at step {steps[0]}, after {type(mine).__name__} has {what} at step "
                f"{after}{reason}. Move it to an earlier step, or list it first."
            )
