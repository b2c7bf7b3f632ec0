"""The `billhook` command: LightningCLI with what this package brings, and commands for checkpoints."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast

import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import billhook  # short class names in YAML work for what is imported
from billhook.cli.fragments import configs_in, dropped_callbacks, without_base
from billhook.cli.misspelt import legal, no_command
from billhook.cli.options import Command, manual, run
from billhook.cli.packaged import with_files
from billhook.cli.reading import without_others_bars

LIGHTNING = ("fit", "validate", "test", "predict")
ONE_SHOT = ("convert", "prune", "prune-heads", "prune-blocks", "prune-structure", "shrink")
MEASURING = ("summary", "inspect", "evaluate", "bench")
COMMANDS = (*ONE_SHOT, "recipes", "schema", "export", "push", *MEASURING, "serve-check")
"""A command is a module of this folder, of `oneshot` or of `measuring`, and the function in it of the same name; its docstring
is the manual."""


def command_of(name: str) -> Command:
    """Returns the function of a command."""
    folder = "oneshot." if name in ONE_SHOT else "measuring." if name in MEASURING else ""
    name = name.replace("-", "_")
    return cast(Command, getattr(import_module(f"billhook.cli.{folder}{name}"), name))


def description() -> str:
    """Returns the front page of `billhook --help`: all commands, each with the first sentence of its docstring."""
    commands = "\n".join(manual(command_of(name)) for name in COMMANDS)
    return f"""Prune and convert Hugging Face transformers inside a Lightning fit.

  billhook fit --config recipe:quickstart
      Trains, with the callbacks in the config: a file of yours, or one that `billhook recipes` lists.
{commands}

Options of a command: `billhook prune --help`. Of a callback, model or data module:
`billhook fit --trainer.callbacks.help KVHeadConversion`, `billhook fit --model.help TransformerModule`,
`billhook fit --data.help TextDataModule`."""


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


class _Parser(LightningArgumentParser):
    """Parser that reports the error and what is legal, instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        wrong = "subcommand" in message
        said = no_command(message, [*LIGHTNING, *COMMANDS]) if wrong else f"{message}\n{legal(message)}".rstrip()
        sys.stderr.write(f"{self.prog.replace(' [options]', '')}: {said}\n")
        self.exit(2)


class BillhookCLI(LightningCLI):
    """LightningCLI with billhook's own model and data as defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes `model: {model: ...}` and `data: {data: ...}` enough."""
        classes = {"model": "billhook.TransformerModule", "data": "billhook.TextDataModule"}
        parser.set_defaults({name: {"class_path": path} for name, path in classes.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; `billhook --help` lists them.

    Args:
        arguments: The words after `billhook` on the command line; by default those of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # batches come from memory, where more processes would not help; the other is between Lightning and torch
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    if given == ["--version"]:
        print(billhook.__version__)
        return
    command = given[0] if given else ""
    try:
        if command in COMMANDS:
            with without_others_bars():
                run(command_of(command), given[1:])
        else:
            words = with_files(given)
            for warning in [*dropped_callbacks(configs_in(words)), *without_base(words, configs_in(given))]:
                sys.stderr.write(f"billhook {command}: warning: {warning}\n")
            _lightning(words)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        if (refusal := _refusal(error)) is None and (command not in COMMANDS or isinstance(error, RuntimeError)):
            raise
        sys.exit(f"billhook {command}: {refusal or error}")


def _refusal(error: BaseException | None) -> BaseException | None:
    """Returns the error, or its cause, if billhook itself raised it: then the message says more than a traceback."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        own = frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if own and isinstance(error, ValueError | RuntimeError):
            return error
        error = error.__cause__
    return None


def _lightning(arguments: list[str]) -> None:
    BillhookCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "billhook", "description": description(), "formatter_class": _Help},
        parser_class=_Parser,
        args=arguments,
    )
