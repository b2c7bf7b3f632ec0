"""The commands, and a function as a command: its parameters are the options, and its docstring is the manual."""

import ast
import difflib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_origin

from jsonargparse import ArgumentParser

from billhook.cli.stopped import written_alone

Command = Callable[..., None]
LIGHTNING = ("fit", "validate", "test", "predict")
COMMANDS = {
    "convert": "convert",
    "prune": "prune",
    "prune-heads": "prune_heads",
    "prune-blocks": "prune_structure",
    "prune-structure": "prune_structure",
    "shrink": "shrink",
    "recipes": "recipes",
    "schema": "schema",
    "export": "export",
    "push": "export",
    "summary": "inspect",
    "inspect": "inspect",
    "evaluate": "evaluate",
    "bench": "bench",
    "serve-check": "export",
}
"""The module of each command in this folder; it has a function of the command's name, whose docstring is the manual."""
ONE_SHOT = ("convert", "prune", "prune-heads", "prune-blocks", "prune-structure", "shrink")
ARGUMENTS = {"batches": "--examples, --length and --batch_size", "sources": "--data"}
"""The options that arguments of functions which one-shot commands call come from."""


class _Parser(ArgumentParser):
    """Parser that reports the error and what is legal, instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        _, _, words = message.partition("unrecognized arguments: ")
        unknown = re.findall(r"(?:^|\s)(--)([\w.-]+)", words) + re.findall(r"^()Option '(\w+)' is not accepted", message)
        options = [action.dest for action in self._actions if action.option_strings]
        lines = [f"there is no option '{dashes}{name}'.{near(name, options, dashes)}" for dashes, name in unknown]
        said = "\n".join(lines) or f"{message}\n{legal(message)}".rstrip()
        sys.stderr.write(f"{self.prog}: {said}\n`{self.prog} --help` lists all options.\n")
        self.exit(2)


def near(wrong: str, names: Sequence[str], before: str = "") -> str:
    """Asks whether the nearest name is meant, behind a space and with what stands before it; empty if none is near.

    >>> near("pruine", ["convert", "prune"])
    " Did you mean 'prune'?"
    """
    return "".join(f" Did you mean '{before}{name}'?" for name in difflib.get_close_matches(wrong, names, n=1))


NO_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
NO_TRAINER_ARGUMENT = re.compile(r"(?:not accept option '|unrecognized arguments: --)trainer\.(\w+)")
NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
TYPES = re.compile(r"Subtypes: (.*)")


def legal(message: str) -> str:
    """Lists what is legal in the place of the arguments and classes that a parser's message says are not; empty if it names none.

    Args:
        message: What jsonargparse says of a wrong argument or class.
    """
    from billhook.cli.schema import public_classes  # which takes seconds: a misspelt command is told at once

    lines = []
    unknown = NO_ARGUMENT.findall(message)
    unknown += [("lightning.pytorch.Trainer", name) for name in NO_TRAINER_ARGUMENT.findall(message)]
    for path, name in unknown:
        arguments = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
        lines.append(f"{path} has no '{name}'.{near(name, arguments)} It takes: {', '.join(arguments)}\n")
    classes = set[str]()
    for path in re.findall(r"\w+(?:\.\w+)+", " ".join(TYPES.findall(message))):
        try:
            base = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError):  # of a class within a function
            continue
        if isinstance(base, type):  # and not typing.Literal
            classes.update(kind.__name__ for kind in public_classes(base))
    for name in dict.fromkeys(NO_CLASS.findall(message)) if classes else ():
        there = f"There are: {', '.join(sorted(classes))}; or module.Class of your own"
        lines.append(f"There is no class '{name}'.{near(name, sorted(classes))} {there}\n")
    return "".join(lines)


def no_command(wrong: str, commands: Sequence[str], program: str = "billhook") -> str:
    """Names the command that there is not, with the nearest, and all that there are; or tells that one is needed.

    Args:
        wrong: The word in its place; empty if there was none.
        commands: The names of all commands.
        program: What the command line begins with.
    """
    said = f"there is no command '{wrong}'.{near(wrong, commands)}" if wrong else "a command is needed."
    return f"{said} `{program} --help` says what each does.\nThere are: {', '.join(commands)}"


def in_options(command: str, message: str) -> str:
    """Returns a message that begins with an argument of a function as a command's options say it.

    >>> in_options("shrink", "batches: three rows at least; got 2")
    '--examples, --length and --batch_size: three rows at least; got 2'
    """
    argument, colon, rest = message.partition(": ")
    return f"{ARGUMENTS[argument]}{colon}{rest}" if command in ONE_SHOT and argument in ARGUMENTS else message


def command_of(name: str) -> Command:
    """Returns the function of a command."""
    return cast(Command, getattr(import_module(f"billhook.cli.{COMMANDS[name]}"), name.replace("-", "_")))


def run(command: Command, words: Sequence[str]) -> None:
    """Runs a command with the words of a command line.

    A parameter whose type is a dataclass is given by the options of its fields: `--params 0.8` for `amount: Amount`.
    """
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in parameters.items() if is_dataclass(parameter.annotation)
    }
    kinds = {name: parameter.annotation for name, parameter in parameters.items() if name not in groups}
    positional = [name for name in kinds if parameters[name].default is inspect.Parameter.empty]
    kinds |= {field.name: field.type for group in groups.values() for field in fields(group)}  # may have a group's name

    name = command.__name__.replace("_", "-")
    parser = _Parser(prog=f"billhook {name}", description=inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0])
    parser.add_argument("--config", action="config", help="A YAML file of options.")
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(groups), sub_configs=True)
    for group in groups.values():
        parser.add_class_arguments(group, sub_configs=True)
    parsed = vars(parser.instantiate(parser.parse_args(_as_jsonargparse_reads(words, kinds, positional))))

    values = {name: _int_where_legal(value, kinds.get(name)) for name, value in parsed.items()}
    arguments = {name: values[name] for name in parameters if name in values}
    for name, group in groups.items():
        arguments[name] = group(**{field.name: values[field.name] for field in fields(group)})
    with written_alone(parsed):
        command(**arguments)


def _int_where_legal(value: object, kind: object) -> object:
    """Makes an int of a whole float: once Lightning's types are read, jsonargparse tries float first for `int | float`."""
    return int(value) if isinstance(value, float) and value.is_integer() and int in get_args(kind) else value


def _as_jsonargparse_reads(words: Sequence[str], kinds: dict[str, Any], positional: Sequence[str]) -> list[str]:
    """Makes `--sizes=[1, 8]` of `--sizes 1 8`, `--json=true` of `--json`, and `--name=wanda` of `wanda` where none is needed.

    Where an option takes a list or a single value, it gets a list only behind all words that a command needs: these may follow.
    """
    first = next(iter(kinds), "")
    runs = [[first]]  # an option with its values, the first parameter with the words before all options
    joined = set[int]()  # the runs of options that have `=`, of which a switch has its value already
    for word in words:
        if word.startswith("--"):
            joined |= {len(runs)} if "=" in word else set()
            runs.append(word.removeprefix("--").split("=", 1))
        elif word.startswith("-"):
            runs.append([word])
        else:
            runs[-1].append(word)
    needed, made = len(runs[0]) > len(positional), list[str]()
    for number, (name, *values) in enumerate(runs):
        kind = kinds.get(name)
        option = "" if number == 0 and (positional or not first) else name if name.startswith("-") else f"--{name}="
        element = next((get_args(member)[0] for member in (kind, *get_args(kind)) if get_origin(member) is list), None)
        single = [member for member in get_args(kind) if get_origin(member) is not list and member is not NoneType]
        lists = get_origin(kind) is list or not single or (needed and len(values) > 1)
        if kind is bool and number not in joined and values[:1] not in (["true"], ["false"]):
            made += [f"{option}true", *values]
        elif element is not None and values and lists and not values[0].startswith("["):
            made.append(f"{option}[{', '.join(_as_yaml(value, element) for value in values)}]")
        elif values and option:
            made += [option + values[0], *values[1:]]
        elif number:
            made.append(option.removesuffix("="))
        else:
            made += values
    return made


def _as_yaml(value: str, element: object) -> str:
    """Quotes a word, unless it is a number or a mapping and may be one."""
    kinds = {element, *get_args(element)}
    plain = (int in kinds and value.isdecimal()) or (kinds != {str} and value.startswith("{"))
    return value if plain else json.dumps(value)


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
    """Returns how a command is called, and the first sentence of its docstring; read, as importing a command takes seconds."""
    tree = ast.parse(Path(__file__).with_name(f"{COMMANDS[name]}.py").read_text(encoding="utf-8"))
    command = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"))
    words = []
    for argument in command.args.args[: len(command.args.args) - len(command.args.defaults)]:
        word, kind = argument.arg.upper(), ast.unparse(argument.annotation) if argument.annotation else ""
        if kind == "list[str]":
            words.append(f"{word[:-1]} [{word[:-1]} ...]")
        elif kind == "str":
            words.append(word)
    words = words or [f"[{argument.arg.upper()}]" for argument in command.args.args[:1]]
    first = (ast.get_docstring(command) or "").splitlines()[0]
    return f"  billhook {' '.join([name, *words])}\n{textwrap.indent(textwrap.fill(first, 110), ' ' * 6)}"
