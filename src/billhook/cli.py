"""The `billhook` command: LightningCLI with what this package brings, and two commands for checkpoints."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningCLI

import billhook
from billhook.callbacks import Export  # noqa: F401 - short class names work for what is imported
from billhook.export import export
from billhook.report import summary as summarise

DESCRIPTION = "Prune and convert Hugging Face transformers inside a Lightning fit."
EPILOG = "Other commands: `billhook export CKPT OUT`, a Lightning checkpoint to a Hugging Face folder; `billhook summary MODEL`."


def summary(model: str) -> None:
    """Prints what a checkpoint weighs: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a hub name, or "tiny".
    """
    print(summarise(billhook.load(model)))


COMMANDS: dict[str, Callable[..., Any]] = {"export": export, "summary": summary}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; `billhook --help` lists them."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # batches come from memory: more processes would not help
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    if arguments and arguments[0] in COMMANDS:
        auto_cli(COMMANDS[arguments[0]], args=arguments[1:], prog=f"billhook {arguments[0]}", as_positional=True)
        return
    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "billhook", "description": DESCRIPTION, "epilog": EPILOG},
        args=arguments,
    )
