"""Gets the loss of a training step that steps its optimizers itself, without a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from billhook.running.overridden import overridden


class _Loss(BaseException):
    """Ends a training step as soon as its loss is known."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


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
        """Calls the closure, which may compute the loss."""
        if closure is not None:
            closure()
        raise ValueError("an optimizer is stepped, and no loss has come to self.manual_backward before")


def manual_loss(pl_module: pl.LightningModule, step: Callable[[], object]) -> Tensor | None:
    """Returns what a training step first gives to `manual_backward`, and leaves weights and gradients as they were.

    It is None if nothing is given; an optimizer that is stepped before raises ValueError.
    """
    given = pl_module.optimizers()
    still = [_Still(one) for one in given] if isinstance(given, list) else _Still(given)
    gradients = {parameter: parameter.grad for parameter in pl_module.parameters()}
    others = {"toggle_optimizer": _toggle_nothing, "untoggle_optimizer": _toggle_nothing}
    with overridden(pl_module, manual_backward=_end, optimizers=lambda *_, **__: still, **others):
        try:
            for parameter in gradients:
                parameter.grad = None
            step()
        except _Loss as found:
            return found.loss
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
    return None


def _end(loss: Tensor, *_: object, **__: object) -> None:
    raise _Loss(loss)


def _toggle_nothing(*_: object, **__: object) -> None:
    pass
