"""Versions of what makes, loads and measures checkpoints."""

import platform
from contextlib import suppress
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
