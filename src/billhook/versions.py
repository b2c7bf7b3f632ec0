"""Versions of installed packages, and the error for a release that lacks a required name."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata


def versions(*others: str) -> dict[str, str]:
    """Returns the versions of billhook, torch, transformers, other packages, and Python.

    >>> list(versions("no-such-package"))
    ['billhook', 'torch', 'transformers', 'python']
    """
    installed = {}
    for package in ("billhook", "torch", "transformers", *others):
        with suppress(metadata.PackageNotFoundError):  # billhook may run from a clone
            installed[package] = metadata.version(package)
    return installed | {"python": platform.python_version()}


@contextmanager
def version_hint(package: str, purpose: str) -> Iterator[None]:
    """Adds the installed and the supported versions to the error of a failed import.

    Args:
        package: Package name, as pip spells it.
        purpose: What the imported name is needed for, such as "to count sheep".

    Raises:
        ImportError: If a name is missing; any release may drop a private name.

    >>> with version_hint("torch", "to count sheep"):
    ...     from torch import sheep
    Traceback (most recent call last):
    ImportError: torch ...: cannot import name 'sheep' from 'torch', which billhook needs to count sheep. Install torch...
    """
    try:
        yield
    except ImportError as error:
        problem, installed = str(error).partition(" (")[0], versions(package).get(package, "")
        fix = f"Install {supported_versions(package)}."
        raise ImportError(f"{package} {installed}: {problem}, which billhook needs {purpose}. {fix}") from error


def supported_versions(package: str) -> str:
    """Returns billhook's requirement for a package, as pip spells it, or "another release" if unknown."""
    with suppress(metadata.PackageNotFoundError):  # billhook may run from a clone
        for requirement in metadata.requires("billhook") or ():
            if (requirement.removeprefix(package) or "-")[0] in "<>=~!":
                return requirement
    return "another release"
