"""Says what is legal where a command line or a config names an argument or a class that there is not."""

import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence

from billhook.model.plan import subclasses

NO_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
NO_TRAINER_ARGUMENT = re.compile(r"not accept option 'trainer\.(\w+)")
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
        lines.append(f"{path} has no '{name}'.{_near(name, arguments)} It takes: {', '.join(arguments)}\n")
    return "".join([*lines, *_classes(message)])


def _classes(message: str) -> Iterator[str]:
    """Yields a line for each class that there is not."""
    bases = [base for types in TYPES.findall(message) for base in re.findall(r"\w+(?:\.\w+)+", types)]
    names = sorted({name for base in bases for kind in _class(base) for name in _of_billhook(kind)})
    for wrong in dict.fromkeys(NO_CLASS.findall(message)) if names else ():
        yield f"There is no class '{wrong}'.{_near(wrong, names)} There are: {', '.join(names)}; or module.Class of your own\n"


def _class(path: str) -> Iterator[type]:
    """Yields the class of a path, if it is one; types as `typing.Literal` are none."""
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):  # of a class within a function
        return
    if isinstance(found, type):
        yield found


def _of_billhook(base: type) -> Iterator[str]:
    """Yields the names of billhook's public classes that are a base class's."""
    for kind in subclasses(base):
        if kind.__module__.startswith("billhook.") and not kind.__name__.startswith("_") and not inspect.isabstract(kind):
            yield kind.__name__


def _near(wrong: str, names: Sequence[str]) -> str:
    return "".join(f" Did you mean '{name}'?" for name in difflib.get_close_matches(wrong, names, n=1))
