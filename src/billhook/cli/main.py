"""The `billhook` command: Lightning's subcommands, and commands for checkpoints."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import billhook
from billhook.cli.options import COMMANDS, LIGHTNING, command_of, description, in_options, no_command, run
from billhook.cli.recipes import configs_in, warnings_of, with_files
from billhook.cli.stopped import Terminated, terminated_like_interrupted


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; `billhook --help` lists them.

    Args:
        arguments: The words after `billhook` on the command line; by default those of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    # batches come from memory, where more processes would not help; the other is between Lightning and torch
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
    if command not in (*LIGHTNING, *COMMANDS) and not command.startswith("-"):
        sys.stderr.write(f"billhook: {no_command(command, [*LIGHTNING, *COMMANDS])}\n")
        sys.exit(2)
    try:
        if command == "recipes":
            run(command_of(command), words[1:])
        elif command in COMMANDS:
            _run(command, words[1:])
        else:
            lines = with_files(words)
            for warning in warnings_of(lines, configs_in(words)):
                sys.stderr.write(f"billhook {command}: warning: {warning}\n")
            _lightning(lines)
    except KeyboardInterrupt as interrupt:
        _end(command, interrupt)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # by which Lightning ends a fit
            _end(command, ended.__context__)
        raise
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        if (refusal := _refusal(error)) is None and (command not in COMMANDS or isinstance(error, RuntimeError)):
            raise
        said = f"billhook {command}: {in_options(command, str(refusal or error))}"
        sys.exit("\n".join([said, *getattr(error, "__notes__", ())]))


def _end(command: str, interrupt: KeyboardInterrupt) -> NoReturn:
    """Ends a command that was stopped with a line of what stays, and the status of the signal."""
    what = str(interrupt)
    if command == "fit":
        what = "checkpoints that were written stay: with --ckpt_path FILE the same command goes on from one"
    sys.stderr.write(f"billhook {command}: stopped{what and '; '}{what}\n")
    sys.exit(128 + (signal.SIGTERM if isinstance(interrupt.__cause__ or interrupt, Terminated) else signal.SIGINT))


def _refusal(error: BaseException | None) -> BaseException | None:
    """Returns the error, or its cause, if billhook itself raised it: then the message says more than a traceback."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        raised_here = frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if raised_here and isinstance(error, ValueError | RuntimeError):
            return error
        error = error.__cause__
    return None


# what takes seconds to import is imported once it is needed


def _run(command: str, words: list[str]) -> None:
    for name in dir(billhook):  # short class names work for what is imported
        getattr(billhook, name)
    from billhook.cli.machine import without_others_bars

    with terminated_like_interrupted(), without_others_bars():
        run(command_of(command), words)


def _lightning(words: list[str]) -> None:
    from billhook.cli.fit import run_lightning

    run_lightning(words)
