"""Walks the fields of a config and sets them by dotted name."""

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

Fields = dict[str, Any]


def set_fields(config: PretrainedConfig, fields: Fields) -> None:
    """Changes fields of a config and of those nested in it."""
    for name, value in fields.items():
        *owners, own = name.split(".")
        owner: Any = config
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, own, copy.copy(value))


def _fields(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _fields(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield f"{prefix}{name}", value
