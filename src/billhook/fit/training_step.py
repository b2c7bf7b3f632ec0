"""Finds out what a user's `training_step` makes of a batch: the call of the model, and the loss."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from billhook.engine.batches import Run, model_loss, runs_of
from billhook.engine.state import overridden


def bind_arguments(method: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Binds as many arguments to a step as it has parameters."""
    parameters = inspect.signature(method).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(method, *(arguments if takes_any else arguments[: len(parameters)]))


def training_runs(pl_module: pl.LightningModule, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """Makes a run of each batch: of the model on the arguments that `training_step` gives it.

    A dictionary of nothing but arguments of the model's forward is given to the model directly. For any other batch the step
    runs until it calls the model. Where it does not call the model as a whole, the step itself is the run. A step that steps
    optimizers itself is not run: under manual optimization all batches are dictionaries for the model.
    """
    names = list(inspect.signature(model.forward).parameters)
    runs: list[Run] = []
    for number, batch in enumerate(batches):
        step = bind_arguments(pl_module.training_step, batch, number)
        if not pl_module.automatic_optimization:
            runs += runs_of(model, [_for_model(pl_module, batch)])
        elif isinstance(batch, Mapping) and set(batch) <= set(names):
            runs += runs_of(model, [batch])
        elif (call := _call(model, step, f"{type(pl_module).__name__} on batch {number}, a {type(batch).__name__}")) is not None:
            runs += runs_of(model, [dict(zip(names, call[0], strict=False)) | call[1]])
        else:
            runs.append(Run(step))
    return runs


def training_loss(pl_module: pl.LightningModule, number: int) -> Callable[[nn.Module, Any], Tensor]:
    """Returns the loss as a function of model and batch: that of `training_step`; under manual optimization the model's own."""

    def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        if not pl_module.automatic_optimization:
            return model_loss(model, _for_model(pl_module, batch), hint="")
        result: Any = bind_arguments(pl_module.training_step, batch, number)()
        value = result["loss"] if isinstance(result, Mapping) else result
        if not isinstance(value, Tensor):
            raise ValueError(f"training_step of {type(pl_module).__name__} gives no loss for batch {number}: {value!r}")
        return value

    return loss


def _for_model(pl_module: pl.LightningModule, batch: Any) -> dict[str, Any]:  # noqa: ANN401
    """Refuses a batch that is no dictionary, which only the step of a module with manual optimization would understand."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration: {type(pl_module).__name__} steps its optimizers itself, so batches are given to the model and not to "
            f"training_step, and a {type(batch).__name__} is no dictionary of what the model takes"
        )
    return batch if isinstance(batch, dict) else dict(batch)


class _Called(BaseException):  # no `Exception`, which a step might catch
    """Ends a training step at a call that is waited for, with the arguments."""


def _call(model: nn.Module, step: Callable[[], object], what: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the arguments of a training step's first call of the model; None if it does not call it."""

    def forward(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _Called(args, kwargs)

    try:
        with overridden(model, forward=forward), torch.compiler.set_stance("force_eager"):  # compiled code would not call it
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
