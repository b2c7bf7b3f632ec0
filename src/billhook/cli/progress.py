"""Shows how far a fit is: a bar without the epochs of a fit that only steps bound, and lines where nobody looks at a bar."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from billhook.bar import lasting
from billhook.fit.run import training_steps

FIRST, EVERY = 20.0, 60.0
"""Seconds until the first line, and between lines."""


class Bar(RichProgressBar):
    """Lightning's bar, which says "Epoch 0/-2" where `max_epochs` is -1, without the number that there is not."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")


class Lines(pl.Callback):
    """Prints a line now and then: the step, the loss, and how long the rest takes."""

    def __init__(self) -> None:
        self._start, self._due, self._from = 0.0, 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start, self._from = time.monotonic(), trainer.global_step
        self._due = self._start + FIRST

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: object) -> None:  # noqa: ANN401
        """Prints a line if one is due; the loss is read then alone, as a device would be waited for."""
        now, done = time.monotonic(), trainer.global_step - self._from
        if now < self._due or not trainer.is_global_zero:
            return
        self._due = now + EVERY
        total, loss = training_steps(trainer), outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        words = [f"step {trainer.global_step:,}" + (f" of {total:,}" if total else "")]
        words += [f"loss {float(loss):.4g}"] if loss is not None else []
        if total and done:
            words.append(f"about {lasting((now - self._start) / done * (total - trainer.global_step))} left")
        print(", ".join(words), flush=True)


def shown(trainer: pl.Trainer) -> pl.Trainer:
    """Puts `Bar` in the place of Lightning's, and adds `Lines` where that is shown to no terminal; without a bar, neither."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for number, callback in enumerate(callbacks):
        if type(callback) is RichProgressBar:
            callbacks[number] = Bar(int(callback.refresh_rate), theme=callback.theme)
            if not sys.stdout.isatty():
                callbacks.insert(number, Lines())
            break
    return trainer
