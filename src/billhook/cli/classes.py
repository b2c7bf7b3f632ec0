"""Finds the classes that a config or an option may name."""

import inspect

from billhook.model.plan import subclasses


def public_classes(of: type) -> list[type]:
    """Returns billhook's classes that are some class, can be made, and are meant to be; those of commands are not."""
    return [one for one in subclasses(of) if _is_public(one)]


def _is_public(one: type) -> bool:
    ours = one.__module__.startswith("billhook.") and not one.__module__.startswith("billhook.cli.")
    return ours and not inspect.isabstract(one) and not one.__name__.startswith("_")
