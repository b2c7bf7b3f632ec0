"""Keeps attention heads masked in training, checkpoints, and validation."""

from typing import Any

from torch import nn

from billhook.checkpoints.export import MASKED
from billhook.fit.event import State
from billhook.fit.fit import Fit
from billhook.fit.shape_event import ShapeCallback
from billhook.units import Mask, Per, mask, zero_units

Heads = dict[str, list[int]]
"""Numbers of heads by attention module."""


class HeadMasking(ShapeCallback):
    """Keeps `heads` of attention modules masked; a subclass selects the heads and the steps."""

    blockwise = True
    per: Per
    _mask: Mask | None = None

    def reset(self) -> None:
        """Clears events and masks."""
        super().reset()
        self.unmask()
        self.heads: Heads = {}

    def mask(self, module: nn.Module, heads: Heads) -> None:
        """Replaces the masked heads."""
        self.unmask()
        self.heads = heads
        if heads:
            self._mask = mask(module, heads, per=self.per)

    def unmask(self) -> None:
        """Removes the masks and keeps `heads`."""
        if self._mask is not None:
            self._mask.remove()
        self._mask = None

    def begin_training(self, fit: Fit) -> None:
        """Restores a checkpoint's masks and applies events due before the first step."""
        self.mask(fit.module, self.heads)
        super().begin_training(fit)

    def before_evaluation(self, fit: Fit) -> None:
        """Restores a checkpoint's masks in validation, testing, and prediction."""
        if self._mask is None:
            self.mask(fit.module, self.heads)

    def end_training(self, fit: Fit) -> None:
        """Zeroes consumer weights of masked heads, so that the saved model gives the same outputs."""
        self._zero(fit.module)
        super().end_training(fit)

    def release(self, fit: Fit, completed: bool) -> None:
        """Removes all hooks, and zeroes consumer weights again, in case a callback averaged them."""
        if completed:
            self._zero(fit.module)
        self.unmask()

    def _zero(self, module: nn.Module) -> None:
        if self._mask is not None:
            zero_units(module, self.heads, per=self.per)

    def checkpoint_entries(self) -> dict[str, Any]:
        """Returns the masks, which `billhook export` reads."""
        return {MASKED: {"per": self.per, "heads": self.heads}} if self.heads else {}

    def state_dict(self) -> State:
        """Returns events and masked heads."""
        return super().state_dict() | {"heads": self.heads}

    def load_state_dict(self, state_dict: State) -> None:
        """Restores events and masked heads."""
        super().load_state_dict(state_dict)
        self.heads = state_dict["heads"]
