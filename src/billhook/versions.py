"""Versions of what makes, loads and measures checkpoints, and what is said where one of them will not do."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata


def versions(*others: str) -> dict[str, str]:
    """Returns the versions of billhook, torch, transformers and further packages, as far as they are installed, and of Python.

    >>> list(versions("no-such-package"))
    ['billhook', 'torch', 'transformers', 'python']
    """
    found = {}
    for package in ("billhook", "torch", "transformers", *others):
        with suppress(metadata.PackageNotFoundError):  # run from a clone
            found[package] = metadata.version(package)
    return found | {"python": platform.python_version()}


@contextmanager
def needing(package: str, what: str) -> Iterator[None]:
    """Imports within: where a release lacks a name, the error says which one is installed, and with which billhook works.

    Args:
        package: The package, as pip calls it.
        what: What the name is needed for.

    Raises:
        ImportError: If a name is missing, as a private one may be in any release.

    >>> with needing("torch", "to count sheep"):
    ...     from torch import sheep
    Traceback (most recent call last):
    ImportError: torch ...: cannot import name 'sheep' from 'torch', which billhook needs to count sheep: install torch...
    """
    try:
        yield
    except ImportError as error:
        lacks, installed = str(error).partition(" (")[0], versions(package).get(package, "")
        raise ImportError(f"{package} {installed}: {lacks}, which billhook needs {what}: install {supported(package)}") from error


def supported(package: str) -> str:
    """Returns the versions of a package with which billhook works, as pip takes them; "another one" where it is not installed."""
    with suppress(metadata.PackageNotFoundError):  # run from a clone
        for line in metadata.requires("billhook") or ():
            if (line.removeprefix(package) or "-")[0] in "<>=~!":
                return line
    return "another one"
