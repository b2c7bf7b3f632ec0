"""Removes private paths from published data: files and folders keep only their last names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

ABSOLUTE = re.compile(r"(?<![\w./:\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|,;:()\[\]{}]+[/\\])+")
"""Parent folders of an absolute path within a text."""


def without_folders(value: Any) -> Any:  # noqa: ANN401 - plain data
    """Returns plain data with local paths reduced to their last names; Hub names are kept.

    >>> without_folders({"train": "/home/me/text.txt", "also": ["data/*.txt", "owner/name", 3]})
    {'train': 'text.txt', 'also': ['*.txt', 'owner/name', 3]}
    """
    if isinstance(value, Mapping):
        return {name: without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) and _is_local(value) else value


def _is_local(name: str) -> bool:
    """Returns True if a name is a local path rather than a Hub name."""
    if Path(name).is_absolute() or name.startswith(("~", "./", "../")) or any(sign in name for sign in "*?[\\"):
        return True
    with suppress(OSError, ValueError):  # too long, or with a NUL
        return Path(name).exists()
    return False


def without_paths(value: Any) -> Any:  # noqa: ANN401 - plain data
    """Returns plain data with absolute paths in its texts reduced to their last names.

    >>> without_paths(["Calibration('/home/me/text.txt'), 4/8 heads, https://example.org/a/b", "/home/my texts/a.txt"])
    ["Calibration('text.txt'), 4/8 heads, https://example.org/a/b", 'a.txt']
    """
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_folders(value) if Path(value).is_absolute() else ABSOLUTE.sub("", value)


def absolute_paths(value: Any) -> Iterator[str]:  # noqa: ANN401 - plain data
    """Yields the absolute paths in plain data; for a path within a text, its parent folders.

    >>> list(absolute_paths({"by": ["Calibration('/home/me/text.txt')", "4/8 heads"], "/home/me/a.txt": 1}))
    ['/home/me/', '/home/me/a.txt']
    """
    if isinstance(value, Mapping):
        for item in chain.from_iterable(value.items()):
            yield from absolute_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from absolute_paths(item)
    elif isinstance(value, str):
        yield from [value] if Path(value).is_absolute() else (match.group() for match in ABSOLUTE.finditer(value))
