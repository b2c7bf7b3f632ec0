"""Events that change tensor shapes in model, optimizers, DDP, and FSDP2."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from billhook.engine import WRAPPED, Run, class_of, sizes_only
from billhook.fit.event import Event, EventCallback, ModelChange, ShapeFollower
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_close, comm_of
from billhook.model import ModelPlan, Weights, check_replaceable, check_unhooked
from billhook.pruning.repair import RepairOption, repair_if_requested


class ShapeCallback(EventCallback):
    """A callback that changes tensor shapes at given steps."""

    cuts_tensors = True  # by name, instead of dropping modules
    blockwise = False  # events need one gathered block of a sharded model at a time

    @abstractmethod
    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if an event is impossible; called before checkpoints are loaded."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes during training."""
        return False

    def shape_steps(self, fit: Fit) -> list[int]:
        """Returns the steps at which shapes change; -1 means before the optimizer exists."""
        return sorted(self.steps(fit))

    def check_fit(self, fit: Fit) -> None:
        """Raises `ValueError` if the strategy or weight averaging does not support shape changes."""
        name = type(self).__name__
        averaging = fit.averages
        fit.check_reshaping(name)
        if averaging and not self.only_at_start:
            raise ValueError(
                f"{name} changes shapes during training, which {type(averaging[0][0]).__name__} does not support. Prune or "
                "convert first and train the result, or use KVHeadConversion(at='start') without calibration."
            )
        if early := [type(callback).__name__ for callback, copy in averaging if copy is not None]:
            raise ValueError(f"{name} must be listed before {early[0]}, which has already copied the model.")

    def prepare(self, fit: Fit) -> None:
        """Checks the run, and the model once it exists."""
        super().prepare(fit)
        fit.once_model_exists(partial(self._begin_unwrapped, fit))

    def begin_training(self, fit: Fit) -> None:
        """Checks wrappers and optimizers, and applies events that are due before the first step."""
        self._refuse_wrapped(fit.module)
        if not self.only_at_start:
            self._refuse_hidden_state(fit)
            check_replaceable(fit.module, fit.optimizers, type(self).__name__)
            if self.cuts_tensors:
                check_unhooked(dict(fit.module.named_parameters()))
        super().begin_training(fit)

    def _begin_unwrapped(self, fit: Fit) -> None:
        self._refuse_wrapped(fit.module)
        self.begin(fit)

    def _refuse_wrapped(self, module: nn.Module) -> None:
        """Raises `ValueError` if a torch wrapper renames weights that are cut by name."""
        for where, part in module.named_modules() if self.cuts_tensors else ():
            if WRAPPED in part._modules:
                raise ValueError(
                    f"{type(self).__name__}: {where} is wrapped by torch's {class_of(part).__name__}, which renames its weights. "
                    "Use the model's own activation_checkpointing_enable(), formerly gradient_checkpointing_enable(), instead."
                )

    def _refuse_hidden_state(self, fit: Fit) -> None:
        """Raises `ValueError` for optimizers and averaged models that the trainer does not know."""
        known = {id(group["params"]) for optimizer in fit.optimizers for group in optimizer.param_groups}
        for holder in [fit.module, *fit.all_callbacks]:
            attributes = vars(holder) | (dict(fit.module.named_modules()) if holder is fit.module else {})
            for attr, value in attributes.items():
                unknown = isinstance(value, Optimizer) and any(id(group["params"]) not in known for group in value.param_groups)
                if isinstance(value, AveragedModel) or (unknown and holder is fit.module):
                    raise ValueError(
                        f"{type(self).__name__} replaces parameters, but {type(holder).__name__}.{attr} ({type(value).__name__}) "
                        "would keep the old ones. Return an optimizer from configure_optimizers, or prune or convert first and "
                        "train the result."
                    )

    def begin(self, fit: Fit) -> None:
        """Checks the model once it exists."""
        with sizes_only(fit.module):
            self.check(fit)

    def run_change(self, fit: Fit, metrics: dict[str, float], change: ModelChange) -> Event:
        """Changes model and optimizers, also under DDP and FSDP2; see `record_event`."""
        with fit.reshaping(self.blockwise):
            event = super().run_change(fit, metrics, change)
        for callback in fit.callbacks(ShapeFollower):
            callback.follow()
        torch.compiler.reset()  # torch stops compiling after several shapes
        return event

    def repaired(self, fit: Fit, plan: ModelPlan, runs: Sequence[Run], repair: RepairOption) -> tuple[Weights | None, str, str]:
        """Returns repaired weights for a plan, a note, and words for the event."""
        weights, why = repair_if_requested(fit.model, plan, runs, repair, comm_of(fit, self.calibration.shared(fit)))
        check_close(fit, type(self).__name__, "the repaired weights", fit.model, weights or {})
        words = "repaired" if weights else why
        return weights, why, f", {words}" if words else ""


def check_no_shape_changes(
    fit: Fit, mine: EventCallback, after: int, before: int, what: str, why: Callable[[ShapeCallback], str | None]
) -> None:
    """Raises `ValueError` if other callbacks change shapes between two events of a callback.

    At the same step, the order of callbacks decides.

    Args:
        fit: The training run.
        mine: The callback.
        after: Step of its first event.
        before: Step of its last event.
        what: Effect of the first event, for the message.
        why: Function that returns why another callback must not change shapes, for the message; None if it may.
    """
    seen = False
    for callback in fit.callbacks(EventCallback):
        seen |= callback is mine
        if callback is mine or not isinstance(callback, ShapeCallback) or (reason := why(callback)) is None:
            continue
        if steps := [step for step in callback.shape_steps(fit) if (after, False) < (step, seen) < (before, True)]:
            raise ValueError(
                f"{type(callback).__name__} changes shapes at step {steps[0]}, after {type(mine).__name__} has {what} at step "
                f"{after}{reason}. Move it to an earlier step, or list it first."
            )
