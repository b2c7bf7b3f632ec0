"""LightningCLI with what this package brings: `billhook fit`, `validate`, `test` and `predict`."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import billhook
import billhook.training.captions  # so that a config may say SpeechDataModule as it says TextDataModule
import billhook.training.speech  # noqa: F401
from billhook.cli.misspelt import legal, no_command
from billhook.cli.options import COMMANDS, LIGHTNING
from billhook.cli.progress import shown


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
