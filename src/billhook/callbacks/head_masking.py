"""Keeps heads masked through a fit: after a resume, in checkpoints, in validation alone, and as zeros once it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from billhook.checkpoints.export import MASKED
from billhook.fit.shape_event import ShapeCallback
from billhook.units.gates import Mask, mask, zero_units
from billhook.units.units import Per


class HeadMasking(ShapeCallback):
    """Masks `heads`, by attention, in a fit; which ones, and when, a subclass decides."""

    blockwise = True
    per: Per
    _mask: Mask | None = None

    def reset(self) -> None:
        """Forgets all events, and which heads are masked."""
        super().reset()
        self.unmask()
        self.heads: dict[str, list[int]] = {}

    def mask(self, module: nn.Module, heads: dict[str, list[int]]) -> None:
        """Masks heads, instead of those that were masked before."""
        self.unmask()
        self.heads = heads
        if heads:
            self._mask = mask(module, heads, per=self.per)

    def unmask(self) -> None:
        """Removes the masks; `heads` stays as it is."""
        if self._mask is not None:
            self._mask.remove()
        self._mask = None

    @contextmanager
    def restore_masks_on_error(self, module: nn.Module) -> Iterator[None]:
        """Masks the heads that are masked now again after an error, unless an event has happened within."""
        heads, events = self.heads, len(self.events)
        try:
            yield
        except BaseException:
            if len(self.events) == events:
                self.mask(module, heads)
            raise

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks the heads that a checkpoint has masked, and carries out what is due before the first step."""
        self.mask(pl_module, self.heads)
        super().on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks the heads that the checkpoint has masked, outside of a fit."""
        if trainer.state.fn != TrainerFn.FITTING and self._mask is None:
            self.mask(pl_module, self.heads)

    on_test_start = on_predict_start = on_validation_start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zeroes the weights that read masked heads, so that the saved model computes the same."""
        self._zero(pl_module)
        super().on_train_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the LightningModule as it was found, except for what was pruned, also if averaged weights have come since."""
        if stage == "fit":
            self._zero(pl_module)
        super().teardown(trainer, pl_module, stage)

    def _zero(self, module: nn.Module) -> None:
        if self._mask is not None:
            zero_units(module, self.heads, per=self.per)

    def release_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes all hooks."""
        self.unmask()
        super().release_masks(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds shape and masks, for `billhook export` too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.heads:
            checkpoint[MASKED] = {"per": self.per, "heads": self.heads}

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far, and which heads are masked."""
        return super().state_dict() | {"heads": self.heads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self.heads = state_dict["heads"]
