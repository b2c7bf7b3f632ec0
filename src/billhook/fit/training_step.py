"""Extracts model inputs and loss from a `training_step`."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from billhook.engine.state import overridden


def bind_arguments(method: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Binds the first arguments to a step, up to its number of parameters."""
    parameters = inspect.signature(method).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(method, *(arguments if takes_any else arguments[: len(parameters)]))


def forward_arguments(pl_module: pl.LightningModule, batch: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns a batch as a dictionary; raises `ValueError` if it is not a mapping."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration: {type(pl_module).__name__} uses manual optimization, so batches must be dictionaries of the model's "
            f"inputs, got {type(batch).__name__}."
        )
    return batch if isinstance(batch, dict) else dict(batch)


class _Called(BaseException):  # not an `Exception`, which a step might catch
    """Stops a training step at the call of the model, with the arguments."""


def call_of_model(model: nn.Module, step: Callable[[], object], what: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
