"""Says which callback of several an option of a command line is about: the last one before it."""

import inspect
import re
from collections.abc import Iterator, Sequence

import billhook
from billhook.cli.fragments import added

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
