"""LightningCLI with what this package brings: `billhook fit`, `validate`, `test` and `predict`."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import billhook
from billhook.cli.options import COMMANDS, LIGHTNING, legal, no_command
from billhook.fit.run import training_steps
from billhook.progress import format_duration

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
            words.append(f"about {format_duration((now - self._start) / done * (total - trainer.global_step))} left")
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


class ArgumentParser(LightningArgumentParser):
    """A parser for any `LightningCLI` that knows billhook's classes by their short names and suggests the nearest legal name.

    Example:
        >>> from functools import partial
        >>> from lightning.pytorch.cli import LightningCLI
        >>> cli = partial(LightningCLI, parser_class=ArgumentParser)  # cli(MyModule, MyDataModule)
    """

    commands: Sequence[str] = LIGHTNING

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as LightningCLI passes them
        for name in dir(billhook):  # short class names are legal for classes that are imported
            getattr(billhook, name)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and the legal names, and ends the process with exit status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        said = f"{message}\n{legal(message)}".rstrip()
        if "subcommand" in message:
            wrong = re.search(r"invalid choice: '(.*?)'", message)
            said = no_command(wrong[1] if wrong else "", self.commands, self.prog.split()[0])
        sys.stderr.write(f"{self.prog.replace(' [options]', '')}: {said}\n")
        self.exit(2)


class _Parser(ArgumentParser):
    commands = (*LIGHTNING, *COMMANDS)


class BillhookCLI(LightningCLI):
    """LightningCLI with billhook's own model and data as defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes `model: {model: ...}` and `data: {data: ...}` enough."""
        classes = {"model": "billhook.TransformerModule", "data": "billhook.TextDataModule"}
        parser.set_defaults({name: {"class_path": path} for name, path in classes.items()})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # noqa: ANN401 - as LightningCLI passes them
        """Makes the trainer, which shows how far it is also where nobody looks at a bar."""
        return shown(super().instantiate_trainer(**kwargs))


def run_lightning(words: list[str]) -> None:
    """Runs one of Lightning's subcommands."""
    BillhookCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "billhook"},
        parser_class=_Parser,
        args=words,
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Gloo's threads may outlive Python and release its tensors, which aborts the process: pytorch/pytorch#190489
        torch.distributed.destroy_process_group()
