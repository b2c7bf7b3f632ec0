"""The commands, and a function as a command: its parameters are the options, and its docstring is the manual."""

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_origin

from jsonargparse import ArgumentParser

from billhook.cli.misspelt import legal, no_option
from billhook.cli.stopped import written_alone

Command = Callable[..., None]
LIGHTNING = ("fit", "validate", "test", "predict")
ONE_SHOT = ("convert", "prune", "prune-heads", "prune-blocks", "prune-structure", "shrink")
MEASURING = ("summary", "inspect", "evaluate", "bench")
COMMANDS = (*ONE_SHOT, "recipes", "schema", "export", "push", *MEASURING, "serve-check")
"""A command is a module of this folder, of `oneshot` or of `measuring`, and the function in it of the same name; its docstring
is the manual."""


class _Parser(ArgumentParser):
    """Parser that reports the error and what is legal, instead of the whole usage."""

    takes: Sequence[str] = ()
    """The names of a command's options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        said = no_option(message, self.takes) or f"{message}\n{legal(message)}".rstrip()
        sys.stderr.write(f"{self.prog}: {said}\n`{self.prog} --help` lists all options.\n")
        self.exit(2)


ARGUMENTS = {"batches": "--examples, --length and --batch_size", "sources": "--data"}
"""The options that arguments of functions which one-shot commands call come from."""


def in_options(command: str, message: str) -> str:
    """Returns a message that begins with an argument of a function as a command's options say it.

    >>> in_options("shrink", "batches: three rows at least; got 2")
    '--examples, --length and --batch_size: three rows at least; got 2'
    """
    argument, colon, rest = message.partition(": ")
    return f"{ARGUMENTS[argument]}{colon}{rest}" if command in ONE_SHOT and argument in ARGUMENTS else message


def module_of(name: str) -> str:
    """Returns the module of a command, by its name in this folder; the function is called the same."""
    folder = "oneshot." if name in ONE_SHOT else "measuring." if name in MEASURING else ""
    return folder + name.replace("-", "_")


def command_of(name: str) -> Command:
    """Returns the function of a command."""
    module = module_of(name)
    return cast(Command, getattr(import_module(f"billhook.cli.{module}"), module.rpartition(".")[2]))


def run(command: Command, given: Sequence[str]) -> None:
    """Runs a command with the words of a command line.

    A parameter whose type is a dataclass is given by the options of its fields: `--params 0.8` for `amount: Amount`.
    """
    groups, flags, needed = _groups(command), _typed(command), _needed(command)
    about = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0]
    parser = _Parser(prog=f"billhook {name_of(command)}", description=about)
    parser.takes = [name for name in flags if name not in needed]
    parser.add_argument("--config", action="config", help="A YAML file of options.")
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(groups), sub_configs=True)
    for group in groups.values():
        parser.add_class_arguments(group, sub_configs=True)
    words = _named(command, _lists(flags, len(needed), _switches(flags, given)))
    parsed = vars(parser.instantiate(parser.parse_args(words)))
    values = {name: _whole(value, flags.get(name)) for name, value in parsed.items()}
    made = {name: group(**{one.name: values.pop(one.name) for one in fields(group)}) for name, group in groups.items()}
    with written_alone(parsed):
        command(**{name: values[name] for name in inspect.signature(command).parameters if name in values}, **made)


def name_of(command: Command) -> str:
    """Returns the name of a command on a command line."""
    return command.__name__.replace("_", "-")


def _needed(command: Command) -> list[str]:
    """Returns the names of the words that a command begins with."""
    parameters = inspect.signature(command).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and not is_dataclass(one.annotation)]


def _groups(command: Command) -> dict[str, Any]:
    """Returns the dataclasses among the types of a command's parameters, by parameter."""
    parameters = inspect.signature(command).parameters.values()
    return {one.name: one.annotation for one in parameters if isinstance(one.annotation, type) and is_dataclass(one.annotation)}


def _typed(command: Command) -> dict[str, Any]:
    """Returns the types of all options by their names, those of dataclasses' fields too."""
    groups = _groups(command)
    plain = {name: one.annotation for name, one in inspect.signature(command).parameters.items() if name not in groups}
    return plain | {one.name: one.type for group in groups.values() for one in fields(group)}


def _whole(value: object, kind: object) -> object:
    """Makes an int of a whole float where an int is legal: once Lightning's types are read, `int | float` tries float first."""
    return int(value) if isinstance(value, float) and value.is_integer() and int in get_args(kind) else value


def _switches(types: dict[str, Any], given: Sequence[str]) -> list[str]:
    """Makes `--json true` of `--json` alone."""
    flags = {f"--{name}" for name, kind in types.items() if kind is bool}
    following = [*given, ""][1:]
    return [
        f"{argument}=true" if argument in flags and value not in ("true", "false") else argument
        for argument, value in zip(given, following, strict=True)
    ]


def _named(command: Command, given: Sequence[str]) -> list[str]:
    """Makes `--name wanda` of `wanda` alone, where a command's first parameter may be left out."""
    first = next(iter(inspect.signature(command).parameters.values()), None)
    alone = first is not None and first.default is not first.empty and len(given) == 1 and not given[0].startswith("-")
    return [f"--{first.name}", *given] if first is not None and alone else list(given)


def _lists(types: dict[str, Any], needed: int, given: Sequence[str]) -> list[str]:
    """Makes a list of values in a row where an option takes one: `bench before after --batch_sizes 1 8`.

    Where an option also takes a single value, it gets a list only behind all words that a command needs: these may follow it.
    """
    runs = [[f"--{next(iter(types), '')}"]]  # words before all options are the first parameter's
    for argument in given:
        if argument.startswith("-"):
            name, is_one, value = argument.partition("=")
            runs.append([name, value] if is_one and _element(types.get(name[2:])) else [argument])
        else:
            runs[-1].append(argument)
    complete = len(runs[0]) > needed
    return [word for option, *values in runs for word in _joined(option, values, types.get(option[2:]), complete)][1:]


def _joined(option: str, values: list[str], kind: object, complete: bool) -> list[str]:
    """Makes one word of an option's values, where it takes a list and they are one."""
    element, others = _element(kind), {one for one in get_args(kind) if get_origin(one) is not list} - {NoneType}
    takes_one = get_origin(kind) is not list and bool(others)
    if element is None or not values or values[0].startswith("[") or (takes_one and (len(values) == 1 or not complete)):
        return [option, *values]
    return [option, f"[{', '.join(_as_yaml(value, element) for value in values)}]"]


def _element(kind: object) -> object:
    """Returns the type of a list's elements, or of those of a list in a union; None where no list is legal."""
    return next((get_args(one)[0] for one in (kind, *get_args(kind)) if get_origin(one) is list), None)


def _as_yaml(value: str, element: object) -> str:
    """Quotes a word, unless it is a number or a mapping and may be one."""
    kinds = {element, *get_args(element)}
    plain = (int in kinds and value.isdecimal()) or (kinds != {str} and value.startswith("{"))
    return value if plain else json.dumps(value)


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
    words = [_word(one) for one in _extra_needed(command)] or [f"[{one.arg.upper()}]" for one in command.args.args[:1]]
    first = (ast.get_docstring(command) or "").splitlines()[0]
    return f"  billhook {' '.join([name, *words])}\n{textwrap.indent(textwrap.fill(first, 110), ' ' * 6)}"


def _source(name: str) -> ast.FunctionDef:
    module = module_of(name)
    tree = ast.parse(Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    function = module.rpartition(".")[2]
    return next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function)


def _extra_needed(command: ast.FunctionDef) -> list[ast.arg]:
    """Returns the words that a command begins with."""
    without = command.args.args[: len(command.args.args) - len(command.args.defaults)]
    return [one for one in without if one.annotation is not None and ast.unparse(one.annotation) in WORDS]


def _word(argument: ast.arg) -> str:
    name = argument.arg.upper()
    return f"{name[:-1]} [{name[:-1]} ...]" if name.endswith("S") else name
