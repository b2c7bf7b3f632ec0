"""Finds out what a user's `training_step` makes of a batch: the call of the model, and the loss."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from billhook.engine.batches import Run, own_loss, runs_of
from billhook.engine.state import overridden


def with_parameters(method: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Binds as many arguments to a step as it has parameters."""
    parameters = inspect.signature(method).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(method, *(arguments if takes_any else arguments[: len(parameters)]))


def runs_as_in_training(pl_module: pl.LightningModule, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """Makes a run of each batch: of the model on the arguments that `training_step` gives it.

    A dictionary of nothing but arguments of the model's forward is given to the model directly. For any other batch the step
    runs until it calls the model. Where it does not call the model as a whole, the step itself is the run.
    """
    names = list(inspect.signature(model.forward).parameters)
    runs: list[Run] = []
    for number, batch in enumerate(batches):
        step = with_parameters(pl_module.training_step, batch, number)
        if isinstance(batch, Mapping) and set(batch) <= set(names):
            runs += runs_of(model, [batch])
        elif (call := _call(model, step, f"{type(pl_module).__name__} on batch {number}, a {type(batch).__name__}")) is not None:
            runs += runs_of(model, [dict(zip(names, call[0], strict=False)) | call[1]])
        elif pl_module.automatic_optimization:
            runs.append(Run(step))
        else:
            raise ValueError(
                f"calibration: training_step of {type(pl_module).__name__} steps its optimizers itself and does not call "
                f"{type(model).__name__} as a whole: give batches that the model takes, as dictionaries"
            )
    return runs


def training_loss(pl_module: pl.LightningModule, number: int) -> Callable[[nn.Module, Any], Tensor]:
    """Returns the loss as a function of model and batch: that of `training_step`, or what it gives to `manual_backward`."""

    def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        step = with_parameters(pl_module.training_step, batch, number)
        if not pl_module.automatic_optimization:
            return _manual_loss(pl_module, model, step, batch, number)
        given: Any = step()
        found = given["loss"] if isinstance(given, Mapping) else given
        if not isinstance(found, Tensor):
            raise ValueError(f"training_step of {type(pl_module).__name__} gives no loss for batch {number}: {found!r}")
        return found

    return loss


def _manual_loss(
    pl_module: pl.LightningModule,
    model: nn.Module,
    step: Callable[[], object],
    batch: Any,  # noqa: ANN401
    number: int,
) -> Tensor:
    """Returns the loss of a module that steps its optimizers itself; for batches that only the model takes, the model's own."""
    try:
        found = _given_to_backward(pl_module, step)
        reason: object = "it gives nothing to manual_backward"
    except Exception as error:
        found, reason = None, error
    if found is not None:
        return found
    try:
        return own_loss(model, dict(batch) if isinstance(batch, Mapping) else batch, hint="")
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {type(pl_module).__name__}, which steps its optimizers itself, has no loss for batch "
            f"{number} ({reason}), and neither has {type(model).__name__} ({error})"
        ) from error


class _Called(BaseException):
    """Ends a training step at a call that is waited for, with the arguments."""


def _call(model: nn.Module, step: Callable[[], object], what: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the arguments of a training step's first call of the model; None if it does not call it."""

    def forward(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _Called(args, kwargs)

    try:
        with overridden(model, forward=forward), torch.compiler.set_stance("force_eager"):
            step()
    except _Called as call:
        args, kwargs = call.args
        return args, kwargs
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {what} failed before it came to {type(model).__name__} ({error}): "
            "give batches that the model takes, as dictionaries"
        ) from error
    return None


class _Still:
    """Stands in for an optimizer: it has the same attributes, and takes no step."""

    def __init__(self, optimizer: LightningOptimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of an optimizer
        return getattr(self._optimizer, name)

    def zero_grad(self, *_: object, **__: object) -> None:
        """Does nothing."""

    def toggle_model(self, *_: object, **__: object) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def step(self, closure: Callable[[], object] | None = None, **_: object) -> None:
        """Calls the closure, which may compute the loss; it must be known then."""
        if closure is not None:
            closure()
        raise ValueError("an optimizer is stepped, and no loss has come to self.manual_backward before")


def _given_to_backward(pl_module: pl.LightningModule, step: Callable[[], object]) -> Tensor | None:
    """Returns what a step first gives to `manual_backward`, if anything; weights and gradients stay as they were."""

    def end(loss: Tensor, *_: object, **__: object) -> None:
        raise _Called(loss)

    given = pl_module.optimizers()
    still = [_Still(one) for one in given] if isinstance(given, list) else _Still(given)
    gradients = {parameter: parameter.grad for parameter in pl_module.parameters()}
    others = dict.fromkeys(["toggle_optimizer", "untoggle_optimizer"], lambda *_, **__: None)
    with overridden(pl_module, manual_backward=end, optimizers=lambda *_, **__: still, **others):
        try:
            for parameter in gradients:
                parameter.grad = None
            step()
        except _Called as call:
            (found,) = call.args
            return found  # type: ignore[no-any-return]
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
    return None
