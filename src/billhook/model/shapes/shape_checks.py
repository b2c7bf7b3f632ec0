"""Checks that a shape in a checkpoint is as billhook writes it, before anything is made of it."""

from collections.abc import Callable, Mapping
from typing import Any

FLAG = "multi_query"
"""The field of config and attention that says in some families that there is one KV head: the only flag in a shape."""
DIMENSIONS = 8  # more than any layer's weight has


def check_plain_shape(plain: object) -> None:
    """Refuses what `Shape.to_dict` does not make."""
    parts: dict[str, tuple[Callable[[str, Any], bool], str]] = {
        "tensors": (_is_size, "a short list of whole numbers"),
        "attributes": (is_whole, "a whole number of 64 bits"),
        "config": (is_whole, "a whole number of 64 bits"),
        "lists": (is_plain_list, "a list of plain values"),
        "blocks": (_are_blocks, "a number of blocks, and which of them are there, ascending"),
        "handed": (lambda _, stated: isinstance(stated, list), "a list"),
    }
    for part, (holds, legal) in parts.items():
        stated = plain.get(part, {} if part in ("lists", "blocks", "handed") else None) if isinstance(plain, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ValueError(f"shape.{part} is {str(stated)[:80]!r}, and must be a mapping")
        for name, value in stated.items():
            if not isinstance(name, str) or not holds(name, value):
                raise ValueError(f"shape.{part}: {str(name)[:200]} is {str(value)[:80]!r}, and must be {legal}")


def _is_size(_: str, size: object) -> bool:
    return isinstance(size, list | tuple) and len(size) <= DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in size)


def is_whole(name: str, stated: object) -> bool:
    """Tells whether an attribute or field is a number that a shape can hold, or the flag that it does."""
    return (type(stated) is int and abs(stated) < 2**63) or (type(stated) is bool and name.rpartition(".")[2] == FLAG)


def is_plain_list(_: str, stated: object) -> bool:
    """Tells whether a field is a list that a shape can hold."""
    return isinstance(stated, list) and all(value is None or isinstance(value, bool | int | float | str) for value in stated)


def _are_blocks(_: str, stated: object) -> bool:
    if not isinstance(stated, list) or len(stated) != 2 or type(stated[0]) is not int or not isinstance(stated[1], list | tuple):
        return False
    first, there = stated
    return all(type(n) is int and 0 <= n < first for n in there) and list(there) == sorted(set(there))
