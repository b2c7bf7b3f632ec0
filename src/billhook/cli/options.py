"""The list of commands, and the parser that turns a function into a command."""

import ast
import difflib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_origin

from jsonargparse import ArgumentParser

from billhook.cli.interruption import exclusive_output

Command = Callable[..., None]
LIGHTNING = ("fit", "validate", "test", "predict")
COMMANDS = {
    "convert": "convert",
    "prune": "prune",
    "prune-heads": "prune_heads",
    "prune-blocks": "prune_structure",
    "prune-structure": "prune_structure",
    "prune-vocabulary": "prune_structure",
    "shrink": "shrink",
    "recipes": "recipes",
    "export": "export",
    "push": "export",
    "summary": "inspect",
    "inspect": "inspect",
    "evaluate": "evaluate",
    "verdict": "verdict",
    "bench": "bench",
    "serve-check": "export",
}
"""The module of each command. Its function of the same name is the command, and that docstring is the `--help`."""
ONE_SHOT = ("convert", "prune", "prune-heads", "prune-blocks", "prune-structure", "prune-vocabulary", "shrink")
OPTION_NAMES = {"batches": "--examples, --length, and --batch_size", "sources": "--data"}
"""Options of one-shot commands that set an argument of a library function."""


class _Parser(ArgumentParser):
    """Parser that reports an error with the legal values, instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        _, _, unrecognized = message.partition("unrecognized arguments: ")
        unknown = re.findall(r"(?:^|\s)(--)([\w.-]+)", unrecognized)
        unknown += re.findall(r"^()Option '(\w+)' is not accepted", message)
        options = [action.dest for action in self._actions if action.option_strings]
        lines = [f"unknown option '{dashes}{name}'.{suggestion(name, options, dashes)}" for dashes, name in unknown]
        problem = "\n".join(lines) or legal_values(message) or message
        sys.stderr.write(f"{self.prog}: {problem}\n`{self.prog} --help` lists all options.\n")
        self.exit(2)


def suggestion(wrong: str, names: Sequence[str], prefix: str = "") -> str:
    """Returns a question that suggests the closest name; empty if no name is close.

    >>> suggestion("pruine", ["convert", "prune"])
    " Did you mean 'prune'?"
    """
    return "".join(f" Did you mean '{prefix}{name}'?" for name in difflib.get_close_matches(wrong, names, n=1))


UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
UNKNOWN_TRAINER_ARGUMENT = re.compile(r"(?:not accept option '|unrecognized arguments: --)trainer\.(\w+)")
UNKNOWN_CLASS = re.compile(r"class_path '([\w.]+)':\s+(?:module '|No module)|import path string: (\w+)")
VALUE = re.compile(r"Parser key \"([\w.+]+)\":.*?Subtypes: \[(.*?)\]\n.*?Given value: (.*?)$", re.DOTALL | re.MULTILINE)
TYPE = re.compile(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]|\w+\[([\w.]+)\]")
KEYS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a class in YAML."""
WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
"""Legal values by type."""


def legal_values(message: str) -> str:
    """Returns the legal values, for a parser's message on unknown names and wrong values.

    Args:
        message: jsonargparse's message.
    """
    lines = []
    unknown = UNKNOWN_ARGUMENT.findall(message)
    unknown += [("lightning.pytorch.Trainer", name) for name in UNKNOWN_TRAINER_ARGUMENT.findall(message)]
    for path, option in unknown:
        name = option.partition(".")[0]
        arguments = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
        if key := suggestion(name, KEYS):
            lines.append(f"unknown key '{name}'.{key} Keys of a class: {', '.join(KEYS)}")
        elif arguments:
            lines.append(f"{path} has no argument '{name}'.{suggestion(name, arguments)} Arguments: {', '.join(arguments)}")
    if "trainer.callbacks" in message and (option := re.search(r"NestedArg\(key='(\w+)'", message)):
        lines.append(
            f"--trainer.callbacks.{option[1]} applies to the last callback before it on the command line. Put it directly after "
            "the --config that adds its callback."
        )
    if not lines and (match := VALUE.search(message, max(message.rfind("Parser key "), 0))):  # the innermost
        missing = UNKNOWN_CLASS.search(message)
        argument, types, value = match.groups()
        lines.append(_legal_for(argument, types, value, missing[1] or missing[2] if missing else ""))
    return "\n".join(dict.fromkeys(lines))


def _legal_for(argument: str, types: str, value: str, unknown: str) -> str:
    """Returns the legal values of an argument, and a hint if its value has an unknown class."""
    from billhook.model.plan import subclasses  # imports torch, which a misspelled command need not wait for

    words = []
    names = []
    classes = set()
    for path, literals, inside in TYPE.findall(types):
        name = path or inside
        names += re.findall(r"'(\w+)'", literals)
        if literals or name in WORDS:
            words.append(literals or WORDS[name])
            continue
        try:
            base = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):  # a class defined in a function
            continue
        for kind in subclasses(base) if isinstance(base, type) else ():  # those that YAML can name: concrete, and no command
            ours = kind.__module__.startswith("billhook.") and not kind.__module__.startswith("billhook.cli.")
            # `inspect.isabstract` needs the metaclass ABCMeta, which not all of these classes have
            abstract = any(getattr(getattr(kind, member, None), "__isabstractmethod__", False) for member in dir(kind))
            if ours and not kind.__name__.startswith("_") and not abstract:
                classes.add(kind.__name__)
    known = f"{', '.join(sorted(classes))}, or a custom module.Class"
    hint = suggestion(unknown.rpartition(".")[2] or value, [*names, *sorted(classes)])
    if unknown and classes and not {*words} - {WORDS["NoneType"]}:
        return f"{argument}: unknown class '{unknown}'.{hint} Classes: {known}"
    words += [f"a class: {known}"] if classes else []
    if not words or value.startswith(("[", "{", "NestedArg")):
        return ""
    return f"{argument}={value} must be {', '.join(words[:-1])}{' or ' * (len(words) > 1)}{words[-1]}.{hint}"


def unknown_command(wrong: str, commands: Sequence[str], program: str = "billhook") -> str:
    """Returns the error for an unknown or missing command.

    Args:
        wrong: The unknown command; empty if it is missing.
        commands: Names of all commands.
        program: Name of the program.
    """
    problem = f"unknown command '{wrong}'.{suggestion(wrong, commands)}" if wrong else "missing command."
    return f"{problem} See `{program} --help`.\nCommands: {', '.join(commands)}"


def in_options(command: str, message: str) -> str:
    """Returns a message in which options replace the argument name at its beginning.

    >>> in_options("shrink", "batches: needs at least 3 rows, got 2")
    '--examples, --length, and --batch_size: needs at least 3 rows, got 2'
    """
    argument, colon, problem = message.partition(": ")
    is_option = command in ONE_SHOT and argument in OPTION_NAMES
    return f"{OPTION_NAMES[argument]}{colon}{problem}" if is_option else message


def billhook_error(error: BaseException | None) -> BaseException | None:
    """Returns the error (or its cause) that billhook raised, to replace the traceback."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        raised_here = frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if raised_here and isinstance(error, ValueError | RuntimeError):
            return error
        error = error.__cause__
    return None


def command_of(name: str) -> Command:
    """Returns the function of a command."""
    return cast(Command, getattr(import_module(f"billhook.cli.{COMMANDS[name]}"), name.replace("-", "_")))


def run(command: Command, words: Sequence[str], context: AbstractContextManager[None] | None = None) -> None:
    """Runs a command with command-line arguments, within a context once they are parsed.

    The fields of a parameter whose type is a dataclass are options: `--params 0.8` sets `amount: Amount`.
    """
    parameters = inspect.signature(command).parameters
    groups = dict[str, Any]()
    kinds = dict[str, Any]()
    positional = 0
    for name, parameter in parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
        else:
            kinds[name] = parameter.annotation
            positional += parameter.default is parameter.empty
    for group in groups.values():
        kinds |= {field.name: field.type for field in fields(group)}  # a field may share a group's name
    name = command.__name__.replace("_", "-")
    parser = _Parser(prog=f"billhook {name}", description=inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0])
    parser.add_argument("--config", action="config", help="YAML file with options.")
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(groups), sub_configs=True)
    for group in groups.values():
        parser.add_class_arguments(group, sub_configs=True)
    parsed = vars(parser.instantiate(parser.parse_args(_to_jsonargparse(words, kinds, positional))))
    arguments = {}
    for name, parameter in parameters.items():
        if group := groups.get(name):
            arguments[name] = group(**{field.name: _int_where_legal(parsed[field.name], field.type) for field in fields(group)})
        else:
            arguments[name] = _int_where_legal(parsed[name], parameter.annotation)
    with context or nullcontext(), exclusive_output(parsed):
        command(**arguments)


def _int_where_legal(value: object, kind: object) -> object:
    """Converts a whole float to an int if legal: jsonargparse may try float before int."""
    return int(value) if isinstance(value, float) and value.is_integer() and int in get_args(kind) else value


def _to_jsonargparse(words: Sequence[str], kinds: dict[str, Any], positional: int) -> list[str]:
    """Rewrites words for jsonargparse, such as `--sizes 1 8` to `--sizes=[1, 8]`."""
    first = next(iter(kinds), "")
    runs = [[first]]  # each option with its values; the first run has the arguments before all options
    joined = set()  # numbers of the runs with `=`, whose switches already have a value
    values = runs[0]
    for word in words:
        if not word.startswith("-"):
            values.append(word)
            continue
        name, *value = word.removeprefix("--").split("=", 1) if word.startswith("--") else [word]
        earlier = [run for run in runs[1:] if run[0] == name and len(runs[0]) > positional and _list_types(kinds.get(name))]
        if earlier:  # `--data a --data b` means `--data a b`
            values = earlier[0]
            values += value
        else:
            joined |= {len(runs)} if value else set()
            values = [name, *value]
            runs.append(values)
    complete = len(runs[0]) > positional
    made = []
    for number, (name, *values) in enumerate(runs):
        kind = kinds.get(name)
        option = "" if number == 0 and (positional or not first) else name if name.startswith("-") else f"--{name}="
        list_types = _list_types(kind)
        element = get_args(list_types[0])[0] if list_types else None
        single = set(get_args(kind)) - {*list_types, NoneType}
        # a list or a single value: a list only after all required arguments, as these may follow it
        lists = get_origin(kind) is list or not single or (complete and len(values) > 1)
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


def _list_types(kind: object) -> list[Any]:
    """Returns the list types among the types of an option."""
    return [member for member in (kind, *get_args(kind)) if get_origin(member) is list]


def _as_yaml(value: str, element: object) -> str:
    """Quotes a value, unless it is a legal number or mapping."""
    kinds = {element, *get_args(element)}
    unquoted = (int in kinds and value.isdecimal()) or (kinds != {str} and value.startswith("{"))
    return value if unquoted else json.dumps(value)


def description() -> str:
    """Returns the text of `billhook --help`: all commands with their summaries."""
    commands = []
    for name, module in COMMANDS.items():  # from the source, because imports take seconds
        tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
        command = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"))
        words = []
        for argument in command.args.args[: len(command.args.args) - len(command.args.defaults)]:
            word = argument.arg.upper()
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if kind == "list[str]":
                words.append(f"{word[:-1]} [{word[:-1]} ...]")
            elif kind == "str":
                words.append(word)
        words = words or [f"[{argument.arg.upper()}]" for argument in command.args.args[:1]]
        first = (ast.get_docstring(command) or "").splitlines()[0]
        summary = textwrap.indent(textwrap.fill(first, 110), " " * 6)
        commands.append(f"  billhook {' '.join([name, *words])}\n{summary}")
    list_of_commands = "\n".join(commands)
    return f"""usage: billhook [-h | --version] COMMAND ...

Prune and convert Hugging Face transformers, alone or while training with PyTorch Lightning.

  billhook fit --config recipe:quickstart
      Trains a model with the callbacks of a config: your own file, or a recipe (see `billhook recipes`).
  billhook validate, billhook test, billhook predict
      Lightning's other subcommands, with the same configs.
{list_of_commands}

Help on a command: `billhook prune --help`.
Help on a callback, model, or data module:
  billhook fit --trainer.callbacks.help KVHeadConversion
  billhook fit --model.help TransformerModule
  billhook fit --data.help TextDataModule
"""
