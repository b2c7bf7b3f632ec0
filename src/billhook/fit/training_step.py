"""Extracts model inputs and loss from a `training_step`."""

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
    """Binds the first arguments to a step, up to its number of parameters."""
    parameters = inspect.signature(method).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(method, *(arguments if takes_any else arguments[: len(parameters)]))


def training_runs(pl_module: pl.LightningModule, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """Returns a run for each batch: the model on `training_step`'s arguments for it.

    A dictionary that contains only forward arguments goes to the model directly. For other batches, the step runs until it calls
    the model. If it never calls the model as a whole, the step itself is the run. Under manual optimization, the step would
    update weights, so all batches must be dictionaries for the model.
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
    """Returns the loss of `training_step`, or the model's under manual optimization."""

    def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        if not pl_module.automatic_optimization:
            return model_loss(model, _for_model(pl_module, batch), hint="")
        result: Any = bind_arguments(pl_module.training_step, batch, number)()
        value = result["loss"] if isinstance(result, Mapping) else result
        if not isinstance(value, Tensor):
            raise ValueError(f"training_step of {type(pl_module).__name__} returned no loss for batch {number}: {value!r}")
        return value

    return loss


def _for_model(pl_module: pl.LightningModule, batch: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns a batch as a dictionary; raises `ValueError` if it is not a mapping."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration: {type(pl_module).__name__} uses manual optimization, so batches must be dictionaries of the model's "
            f"inputs, got {type(batch).__name__}."
        )
    return batch if isinstance(batch, dict) else dict(batch)


class _Called(BaseException):  # not an `Exception`, which a step might catch
    """Stops a training step at the call of the model, with the arguments."""


def _call(model: nn.Module, step: Callable[[], object], what: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the arguments of a training step's first call of the model, or None."""

    def forward(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _Called(args, kwargs)

    try:
        with (
            overridden(model, forward=forward),
            torch.compiler.set_stance("force_eager"),
        ):  # compiled code skips `forward`
            step()
    except _Called as call:
        args, kwargs = call.args
        return args, kwargs
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {what} failed before it called {type(model).__name__} ({error}). Pass batches as "
            "dictionaries of the model's inputs."
        ) from error
    return None
