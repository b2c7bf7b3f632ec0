"""The `billhook` command: LightningCLI with what this package brings, and commands for checkpoints."""

import argparse
import difflib
import inspect
import json
import os
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter, auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import billhook  # short class names in YAML work for what is imported
from billhook.checkpoints.export import export
from billhook.cli.bench import bench
from billhook.cli.evaluate import evaluate
from billhook.cli.inspect import inspect as inspect_model
from billhook.cli.prune import prune
from billhook.cli.prune_heads import prune_heads
from billhook.cli.prune_structure import prune_structure
from billhook.report.summary import summary as summarise

DESCRIPTION = """Prune and convert Hugging Face transformers inside a Lightning fit.

  billhook fit --config examples/quickstart.yaml      train, with what the callbacks in the config do on the way
  billhook prune MODEL OUT --sparsity 0.5             weights to zero in one shot (Wanda, magnitude, SparseGPT), saved, verified
  billhook prune-heads MODEL OUT --ratio 0.3          attention heads removed (Michel et al.), saved, verified
  billhook prune-structure MODEL OUT --params 0.8     heads, channels, hidden size, experts removed (LLM-Pruner), saved, verified
  billhook export last.ckpt OUT                       a Lightning checkpoint to a Hugging Face folder, verified
  billhook summary MODEL                              parameters, zeros, heads, KV-cache bytes per token, FLOPs
  billhook inspect MODEL                              what belongs together in it; what can be pruned, converted, saved
  billhook evaluate MODEL [MODEL ...] --data Q.jsonl  zero-shot accuracy, perplexity, lm-eval's tasks: side by side
  billhook bench MODEL [MODEL ...] --plot P.png       prefill and decoding: tokens/s, memory, KV cache; speed-up beside the ideal

What a callback, model or data module takes: `billhook fit --trainer.callbacks.help KVHeadConversion`,
`billhook fit --model.help TransformerModule`, `billhook fit --data.help TextDataModule`."""


def summary(model: str) -> None:
    """Prints what a checkpoint weighs: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a hub name, or "tiny".
    """
    print(summarise(billhook.load(model)))


COMMANDS: dict[str, Callable[..., Any]] = {
    "export": export,
    "summary": summary,
    "inspect": inspect_model,
    "evaluate": evaluate,
    "bench": bench,
    "prune": prune,
    "prune-heads": prune_heads,
    "prune-structure": prune_structure,
}


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written."""


class _Parser(LightningArgumentParser):
    """Says what was wrong and what is legal, instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        others = f"Other commands: {', '.join(COMMANDS)}. `billhook --help` tells more.\n" if "subcommand" in message else ""
        sys.stderr.write(f"{self.prog.replace(' [options]', '')}: {message}\n{_legal(message)}{others}")
        self.exit(2)


def _legal(message: str) -> str:
    """The arguments of the classes that a message says were given an unknown one."""
    unknown = re.findall(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
    unknown += [("lightning.pytorch.Trainer", name) for name in re.findall(r"not accept option 'trainer\.(\w+)", message)]
    lines = []
    for path, name in unknown:
        legal = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
        near = [f"'{close}'?" for close in difflib.get_close_matches(name, legal, n=1)]
        lines.append(
            f"{path} has no '{name}'. {' '.join(['Did you mean', *near]) if near else ''} It takes: {', '.join(legal)}\n"
        )
    return "".join(lines)


class BillhookCLI(LightningCLI):
    """LightningCLI in which model and data are billhook's own unless a config names others."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes `model: {model: ...}` and `data: {data: ...}` enough."""
        parser.set_defaults(
            {
                "model": {"class_path": "billhook.TransformerModule"},
                "data": {"class_path": "billhook.TextDataModule"},
            }
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; `billhook --help` lists them.

    Args:
        arguments: What stands behind `billhook` on the command line; by default what really does.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # batches come from memory, where more processes would not help; the other is between Lightning and torch
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    if given == ["--version"]:
        print(billhook.__version__)
        return
    command = given[0] if given else ""
    try:
        if command in COMMANDS:
            function = COMMANDS[command]
            auto_cli(
                function, args=_lists(function, _switches(function, given[1:])), prog=f"billhook {command}", as_positional=True
            )
        else:
            _lightning(arguments)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        if (refusal := _refusal(error)) is None and (command not in COMMANDS or isinstance(error, RuntimeError)):
            raise
        sys.exit(f"billhook {command}: {refusal or error}")


def _switches(command: Callable[..., Any], given: list[str]) -> list[str]:
    """`--json` alone means `--json true`."""
    flags = {f"--{name}" for name, one in inspect.signature(command).parameters.items() if one.annotation is bool}
    following = [*given[1:], ""]
    return [
        f"{argument}=true" if argument in flags and value not in ("true", "false") else argument
        for argument, value in zip(given, following, strict=True)
    ]


def _lists(command: Callable[..., Any], given: list[str]) -> list[str]:
    """Values in a row are a list where the command takes one: `evaluate before after --data a.jsonl b.jsonl`."""
    parameters = inspect.signature(command).parameters
    lists = [f"--{name}" for name, one in parameters.items() if one.annotation in (list[str], list[str] | None)]
    runs = [[f"--{next(iter(parameters))}"]]  # what stands before all options is the first argument's
    for argument in given:
        if argument.startswith("-"):
            runs.append(argument.split("=", 1) if argument.partition("=")[0] in lists else [argument])
        else:
            runs[-1].append(argument)
    joined = [
        [option, json.dumps(values)] if option in lists and values and not values[0].startswith("[") else [option, *values]
        for option, *values in runs
    ]
    return [argument for run in joined for argument in run][1:]


def _refusal(error: BaseException | None) -> BaseException | None:
    """The error, or what caused it, if billhook itself raised it: its message says all; a traceback would hide it."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        own = frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if own and isinstance(error, ValueError | RuntimeError):
            return error
        error = error.__cause__
    return None


def _lightning(arguments: Sequence[str] | None) -> None:
    BillhookCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "billhook", "description": DESCRIPTION, "formatter_class": _Help},
        parser_class=_Parser,
        args=arguments,  # type: ignore[arg-type]
    )
