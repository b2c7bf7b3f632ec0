"""The loss of a training step that steps its optimizers itself, without a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from billhook.running.overridden import overridden


class _Loss(BaseException):
    """The loss has come."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


class _Still:
    """Stands in for an optimizer: says what it says, and takes no step."""

    def __init__(self, optimizer: LightningOptimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever an optimizer has
        return getattr(self._optimizer, name)

    def zero_grad(self, *_: object, **__: object) -> None:
        """Nothing."""

    def toggle_model(self, *_: object, **__: object) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def step(self, closure: Callable[[], object] | None = None, **_: object) -> None:
        """The loss may be in the closure."""
        if closure is not None:
            closure()
        raise ValueError("an optimizer is stepped, and no loss has come to self.manual_backward before")


def loss_by_hand(pl_module: pl.LightningModule, step: Callable[[], object]) -> Tensor | None:
    """What a training step first gives to `manual_backward`, None if nothing; weights and gradients are as before afterwards.

    Args:
        pl_module: The module in training.
        step: Its training step on a batch.

    Raises:
        ValueError: If an optimizer is stepped before.
    """
    given = pl_module.optimizers()
    still = [_Still(one) for one in given] if isinstance(given, list) else _Still(given)
    toggled = {"toggle_optimizer": _nothing, "untoggle_optimizer": _nothing}
    gradients = {parameter: parameter.grad for parameter in pl_module.parameters()}
    try:
        with overridden(pl_module, manual_backward=_here, optimizers=lambda *_, **__: still, **toggled):
            for parameter in gradients:
                parameter.grad = None
            step()
    except _Loss as found:
        return found.loss
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return None


def _here(loss: Tensor, *_: object, **__: object) -> None:
    raise _Loss(loss)


def _nothing(*_: object, **__: object) -> None:
    """Toggles nothing."""
