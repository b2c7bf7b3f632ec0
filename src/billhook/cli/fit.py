"""LightningCLI with billhook's defaults: `billhook fit`, `validate`, `test`, and `predict`."""

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
from billhook.cli.options import COMMANDS, LIGHTNING, billhook_error, legal_values, unknown_command
from billhook.cli.recipes import resolve_recipes
from billhook.fit.run import training_steps
from billhook.progress import format_duration

FIRST, INTERVAL = 20.0, 60.0
"""Seconds until the first progress line, and between lines."""


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, without the "/-2" after the epoch if `max_epochs` is -1."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")


class ProgressLines(pl.Callback):
    """Prints a line per minute with the step, the loss, and the remaining time."""

    _start, _due, _first_step = 0.0, 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start, self._first_step = time.monotonic(), trainer.global_step
        self._due = self._start + FIRST

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: object) -> None:  # noqa: ANN401
        """Prints a line if it is due; only then is the loss read, which waits for the device."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if now < self._due or not trainer.is_global_zero:
            return
        self._due = now + INTERVAL
        total, loss = training_steps(trainer), outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        words = [f"step {trainer.global_step:,}" + (f" of {total:,}" if total else "")]
        words += [f"loss {float(loss):.4g}"] if loss is not None else []
        if total and done:
            words.append(f"about {format_duration((now - self._start) / done * (total - trainer.global_step))} left")
        print(", ".join(words), flush=True)


def replace_progress_bar(trainer: pl.Trainer) -> pl.Trainer:
    """Replaces Lightning's bar with `ProgressBar`, plus `ProgressLines` without a terminal."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for number, callback in enumerate(callbacks):
        if type(callback) is RichProgressBar:
            callbacks[number] = ProgressBar(int(callback.refresh_rate), theme=callback.theme)
            if not sys.stdout.isatty():
                callbacks.insert(number, ProgressLines())
            break
    return trainer


class ArgumentParser(LightningArgumentParser):
    """Parser for any `LightningCLI` with billhook's short class names and suggestions.

    Example:
        >>> from functools import partial
        >>> from lightning.pytorch.cli import LightningCLI
        >>> cli = partial(LightningCLI, parser_class=ArgumentParser)  # cli(MyModule, MyDataModule)
    """

    commands: Sequence[str] = LIGHTNING

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as LightningCLI passes them
        for name in dir(billhook):  # jsonargparse finds imported classes by their short names
            getattr(billhook, name)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and the legal names, and ends the process with exit status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        problem = legal_values(message) or message
        if "subcommand" in message:
            wrong = re.search(r"invalid choice: '(.*?)'", message)
            problem = unknown_command(wrong[1] if wrong else "", self.commands, self.prog.split()[0])
        sys.stderr.write(f"{self.prog.replace(' [options]', '')}: {problem}\n")
        self.exit(2)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: ANN401 - as LightningCLI passes them
        """Parses a command line, in which `--config recipe:NAME` is a file of the package."""
        words = sys.argv[1:] if args is None else args
        try:
            words = resolve_recipes(words) if isinstance(words, list) else words
        except ValueError as error:
            self.error(str(error))
        return super().parse_args(words, *rest, **options)

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:  # noqa: ANN401
        """Creates the objects of a config; billhook's errors end the process with a message."""
        try:
            return super().instantiate_classes(cfg, **options)
        except ValueError as error:
            if (raised := billhook_error(error)) is None:
                raise
            sys.exit(f"{' '.join([self.prog, *filter(None, [getattr(cfg, 'subcommand', None)])])}: {raised}")


class _Parser(ArgumentParser):
    commands = (*LIGHTNING, *COMMANDS)


class BillhookCLI(LightningCLI):
    """LightningCLI with billhook's LightningModule and data module as defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets default classes, so that `model: {model: ...}` and `data: {data: ...}` suffice."""
        classes = {"model": "billhook.TransformerModule", "data": "billhook.TextDataModule"}
        parser.set_defaults({name: {"class_path": path} for name, path in classes.items()})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # noqa: ANN401 - as LightningCLI passes them
        """Returns the trainer, which also reports progress without a terminal."""
        return replace_progress_bar(super().instantiate_trainer(**kwargs))


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
        # Gloo's threads may outlive Python and free its tensors, which aborts the process (pytorch/pytorch#190489)
        torch.distributed.destroy_process_group()
