"""A function as a command: its parameters are the options, and its docstring is the manual."""

import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser

from billhook.cli.misspelt import legal

Command = Callable[..., None]


class _Parser(ArgumentParser):
    """Parser that adds to an error what is legal."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error("\n".join([message, legal(message)]).rstrip(), ex)


def run(command: Command, given: Sequence[str]) -> None:
    """Runs a command with the words of a command line.

    A parameter whose type is a dataclass is given by the options of its fields: `--params 0.8` for `amount: Amount`.
    """
    groups, flags = _groups(command), _typed(command)
    about = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0]
    parser = _Parser(prog=f"billhook {name_of(command)}", description=about)
    parser.add_argument("--config", action="config", help="A YAML file of options.")
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(groups), sub_configs=True)
    for group in groups.values():
        parser.add_class_arguments(group, sub_configs=True)
    parsed = vars(parser.instantiate(parser.parse_args(_named(command, _lists(flags, _switches(flags, given))))))
    values = {name: _whole(value, flags.get(name)) for name, value in parsed.items()}
    made = {name: group(**{one.name: values.pop(one.name) for one in fields(group)}) for name, group in groups.items()}
    command(**{name: values[name] for name in inspect.signature(command).parameters if name in values}, **made)


def name_of(command: Command) -> str:
    """Returns the name of a command on a command line."""
    return command.__name__.replace("_", "-")


def manual(command: Command) -> str:
    """Returns how a command is called, and the first sentence of its docstring."""
    parameters = list(inspect.signature(command).parameters.values())
    needed = [one for one in parameters if one.default is one.empty]
    words = [one.name.upper() for one in needed if not is_dataclass(one.annotation)]
    words = [f"{word[:-1]} [{word[:-1]} ...]" if word.endswith("S") else word for word in words]
    words += [f"[{one.name.upper()}]" for one in parameters[:1] if one not in needed]
    first = inspect.cleandoc(command.__doc__ or "").splitlines()[0]
    return f"  billhook {' '.join([name_of(command), *words])}\n{textwrap.indent(textwrap.fill(first, 110), ' ' * 6)}"


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


def _lists(types: dict[str, Any], given: Sequence[str]) -> list[str]:
    """Makes a list of values in a row where an option takes one: `evaluate before after --data a.jsonl b.jsonl`."""
    lists = [f"--{name}" for name, kind in types.items() if kind in (list[str], list[str] | None)]
    runs = [[f"--{next(iter(types), '')}"]]  # words before all options are the first parameter's
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
