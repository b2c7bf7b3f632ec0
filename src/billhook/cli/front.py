"""The front page of `billhook --help`, read from the commands' source: to import them takes seconds."""

import ast
import textwrap
from pathlib import Path

from billhook.cli.options import COMMANDS, module_of

WORDS = ("str", "list[str]")
"""The types of what a command begins with; other parameters without a default are groups of options."""


def description() -> str:
    """Returns the front page: all commands, each with the first sentence of its docstring."""
    commands = "\n".join(_manual(name) for name in COMMANDS)
    return f"""usage: billhook [-h | --version] COMMAND ...

Prune and convert Hugging Face transformers inside a Lightning fit.

  billhook fit --config recipe:quickstart
      Trains, with the callbacks in the config: a file of yours, or one that `billhook recipes` lists.
  billhook validate, billhook test, billhook predict
      Lightning's other subcommands, with the same configs.
{commands}

Options of a command: `billhook prune --help`. Of a callback, model or data module:
`billhook fit --trainer.callbacks.help KVHeadConversion`, `billhook fit --model.help TransformerModule`,
`billhook fit --data.help TextDataModule`.
"""


def _manual(name: str) -> str:
    """Returns how a command is called, and the first sentence of its docstring."""
    command = _source(name)
    words = [_word(one) for one in _needed(command)] or [f"[{one.arg.upper()}]" for one in command.args.args[:1]]
    first = (ast.get_docstring(command) or "").splitlines()[0]
    return f"  billhook {' '.join([name, *words])}\n{textwrap.indent(textwrap.fill(first, 110), ' ' * 6)}"


def _source(name: str) -> ast.FunctionDef:
    module = module_of(name)
    tree = ast.parse(Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    function = module.rpartition(".")[2]
    return next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function)


def _needed(command: ast.FunctionDef) -> list[ast.arg]:
    """Returns the words that a command begins with."""
    without = command.args.args[: len(command.args.args) - len(command.args.defaults)]
    return [one for one in without if one.annotation is not None and ast.unparse(one.annotation) in WORDS]


def _word(argument: ast.arg) -> str:
    name = argument.arg.upper()
    return f"{name[:-1]} [{name[:-1]} ...]" if name.endswith("S") else name
