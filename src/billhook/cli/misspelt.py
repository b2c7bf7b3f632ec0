"""Says what is legal where a command line or a config names a command, an option or a class that there is not."""

import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence

import billhook
from billhook.cli.fragments import added

NO_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
NO_TRAINER_ARGUMENT = re.compile(r"(?:not accept option '|unrecognized arguments: --)trainer\.(\w+)")
NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
TYPES = re.compile(r"Subtypes: (.*)")


def legal(message: str) -> str:
    """Lists what is legal in the place of the names that a parser's message says are not; empty if it names none.

    Args:
        message: What jsonargparse says of a wrong argument or class.
    """
    unknown = NO_ARGUMENT.findall(message)
    unknown += [("lightning.pytorch.Trainer", name) for name in NO_TRAINER_ARGUMENT.findall(message)]
    lines = []
    for path, name in unknown:
        arguments = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
        lines.append(f"{path} has no '{name}'.{near(name, arguments)} It takes: {', '.join(arguments)}\n")
    return "".join([*lines, *_classes(message)])


def no_option(message: str, options: Sequence[str]) -> str:
    """Names the options that there are not, of a command line or a file, each with the nearest; empty if a message names none.

    Args:
        message: What jsonargparse says of a wrong command line.
        options: The names of a command's options.

    >>> no_option("unrecognized arguments: --sparsty 0.5", ["pattern", "sparsity"])
    "there is no option '--sparsty'. Did you mean '--sparsity'?"
    """
    _, _, words = message.partition("unrecognized arguments: ")
    unknown = re.findall(r"(?:^|\s)(--)([\w.-]+)", words) + re.findall(r"^()Option '(\w+)' is not accepted", message)
    told = (f"there is no option '{dashes}{wrong}'.{near(wrong, options, dashes)}" for dashes, wrong in unknown)
    return "\n".join(told)


def no_command(wrong: str, commands: Sequence[str], program: str = "billhook") -> str:
    """Names the command that there is not, with the nearest, and all that there are; or tells that one is needed.

    Args:
        wrong: What was given; empty if nothing was.
        commands: The names of all commands.
        program: What the command line begins with.
    """
    said = f"there is no command '{wrong}'.{near(wrong, commands)}" if wrong else "a command is needed."
    return f"{said} `{program} --help` says what each does.\nThere are: {', '.join(commands)}"


def _classes(message: str) -> Iterator[str]:
    """Yields a line for each class that there is not."""
    from billhook.cli.schema import public_classes  # which takes seconds: a misspelt command is told at once

    bases = [base for types in TYPES.findall(message) for base in re.findall(r"\w+(?:\.\w+)+", types)]
    names = sorted({one.__name__ for base in bases for kind in _class(base) for one in public_classes(kind)})
    for wrong in dict.fromkeys(NO_CLASS.findall(message)) if names else ():
        yield f"There is no class '{wrong}'.{near(wrong, names)} There are: {', '.join(names)}; or module.Class of your own\n"


def _class(path: str) -> Iterator[type]:
    """Yields the class of a path, if it is one; types as `typing.Literal` are none."""
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):  # of a class within a function
        return
    if isinstance(found, type):
        yield found


def near(wrong: str, names: Sequence[str], before: str = "") -> str:
    """Asks whether the nearest name is meant, behind a space and with what stands before it; empty if none is near.

    >>> near("pruine", ["convert", "prune"])
    " Did you mean 'prune'?"
    """
    return "".join(f" Did you mean '{before}{name}'?" for name in difflib.get_close_matches(wrong, names, n=1))


OPTION = re.compile(r"--trainer\.callbacks\.(?:init_args\.)?(\w+)")


def check_addressed(words: Sequence[str]) -> None:
    """Refuses an option of a callback's argument that the last callback before it does not have, and one before that does."""
    for option, argument, callbacks in _options(words):
        *others, last = callbacks
        having = [name for name in others if _takes(name, argument)]
        if having and not _takes(last, argument):
            raise ValueError(
                f"{option} is about the last callback before it, {last}, which has no '{argument}', of {', '.join(callbacks)}: "
                f"put it behind the file that gives {having[-1]}, as in `--config FILE {option} VALUE --config MORE`"
            )


def told_addressed(words: Sequence[str]) -> list[str]:
    """Returns for each option of a callback's argument which callback it is about, where others of its kind stand before it."""
    return [
        f"{option} is about the last {last} before it, of {callbacks.count(last)}: put it behind the file of the one you mean"
        for option, _, callbacks in _options(words)
        if callbacks.count(last := callbacks[-1]) > 1
    ]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the options of callbacks' arguments, the argument of each, and the callbacks before it, if there are some."""
    for place, word in enumerate(words):
        if (found := OPTION.match(word)) and (callbacks := added(words[:place])):
            yield word.partition("=")[0], found[1], callbacks


def _takes(name: str, argument: str) -> bool:
    """Tells whether a callback of billhook has an argument; of others that is not known, and left to the parser."""
    kind = getattr(billhook, name, None)
    return not isinstance(kind, type) or argument in ("class_path", *inspect.signature(kind).parameters)
