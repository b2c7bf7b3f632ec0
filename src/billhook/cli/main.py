"""The `billhook` program: Lightning's subcommands, and commands for checkpoints."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import billhook
from billhook.cli.interruption import Terminated, sigterm_as_interrupt
from billhook.cli.options import (
    COMMANDS,
    LIGHTNING,
    billhook_error,
    command_of,
    description,
    in_options,
    run,
    suggestion,
    unknown_command,
)
from billhook.cli.recipes import config_files, config_warnings, resolve_recipes


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; `billhook --help` lists all commands.

    Args:
        arguments: Command-line arguments after `billhook`. Defaults to the arguments of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    # batches come from memory, where worker processes would not help; the second is about how Lightning calls torch
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    if words == ["--version"]:
        print(billhook.__version__)
        return
    if words in (["-h"], ["--help"]):
        print(description(), end="")
        return
    command = words[0] if words else ""
    if command in COMMANDS:
        answer_at_once(command, words[1:])
    if command not in (*LIGHTNING, *COMMANDS) and not command.startswith("-"):
        sys.stderr.write(f"billhook: {unknown_command(command, [*LIGHTNING, *COMMANDS])}\n")
        sys.exit(2)
    try:
        if command == "recipes":
            run(command_of(command), words[1:])
        elif command in COMMANDS:
            _run(command, words[1:])
        else:
            resolved = resolve_recipes(words)
            for warning in config_warnings(resolved, config_files(words)):
                sys.stderr.write(f"billhook {command}: warning: {warning}\n")
            from billhook.cli.fit import run_lightning  # imports Lightning, which takes seconds

            run_lightning(resolved)
    except KeyboardInterrupt as interrupt:
        _end(command, interrupt)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning ends an interrupted fit with it
            _end(command, ended.__context__)
        raise
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        raised = billhook_error(error)
        if raised is None and (command not in COMMANDS or isinstance(error, RuntimeError)):
            raise
        message = f"billhook {command}: {in_options(command, str(raised or error))}"
        sys.exit("\n".join([message, *getattr(error, "__notes__", ())]))


def answer_at_once(command: str, words: Sequence[str]) -> None:
    """Ends with the stored help, or with an error for an unknown option, without torch."""
    text = Path(__file__).with_name("help").joinpath(f"{command}.txt").read_text(encoding="utf-8")
    if list(words) in (["-h"], ["--help"]):
        print(text, end="")
        sys.exit(0)
    known = set(re.findall(r"(?<![\w-])--([A-Za-z_]\w*)", text)) | {"help"}
    names = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    if unknown := [name for name in names if name.split(".")[0].rstrip("+") not in known]:
        lines = [f"unknown option '--{name}'.{suggestion(name, sorted(known), '--')}" for name in unknown]
        sys.stderr.write(
            "\n".join([f"billhook {command}: {lines[0]}", *lines[1:], f"`billhook {command} --help` lists all options.\n"])
        )
        sys.exit(2)


def _end(command: str, interrupt: KeyboardInterrupt) -> NoReturn:
    """Ends an interrupted command with a line on its results and the signal's status."""
    results = str(interrupt)
    if command == "fit":
        results = "Checkpoints are kept. Resume with --ckpt_path FILE."
    sys.stderr.write(f"billhook {command}: {f'interrupted. {results}'.strip()}\n")
    sys.exit(128 + (signal.SIGTERM if isinstance(interrupt.__cause__ or interrupt, Terminated) else signal.SIGINT))


def _run(command: str, words: list[str]) -> None:
    for name in ("criteria", "importance", "kv_methods"):  # jsonargparse finds imported classes by their short names
        getattr(billhook, name)
    from billhook.cli.machine import hide_library_bars  # imports torch, which takes seconds

    with sigterm_as_interrupt():
        run(command_of(command), words, hide_library_bars())
