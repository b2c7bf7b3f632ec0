"""Whether what a checkpoint says of a model's shape is as billhook writes it; asked before anything is made of it."""

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor

VERSION = 1
DIMENSIONS = 8  # more than any layer's weight has
KINDS = {"class": str, "config": str, "prefix": str, "shape": Mapping}
"""What a Lightning checkpoint says of its model."""


def check_plain_shape(plain: object) -> None:
    """Refuses what `Shape.to_dict` does not make.

    Raises:
        ValueError: With the part that is not as it should be.
    """
    parts: dict[str, tuple[Callable[[Any], bool], str]] = {
        "tensors": (_is_size, "a short list of whole numbers"),
        "attributes": (_is_whole, "a whole number of 64 bits"),
        "config": (_is_whole, "a whole number of 64 bits"),
        "lists": (_is_plain_list, "a list of plain values"),
        "blocks": (_are_blocks, "a number of blocks, and which of them are there, ascending"),
        "handed": (lambda said: isinstance(said, list), "a list"),
    }
    for part, (holds, legal) in parts.items():
        said = plain.get(part, {} if part in ("lists", "blocks", "handed") else None) if isinstance(plain, Mapping) else None
        if not isinstance(said, Mapping):
            raise ValueError(f"shape.{part} is {str(said)[:80]!r}, and must be a mapping")
        for name, value in said.items():
            if not isinstance(name, str) or not holds(value):
                raise ValueError(f"shape.{part}: {str(name)[:200]} is {str(value)[:80]!r}, and must be {legal}")


def check_held(held: object, state: object) -> None:
    """Refuses what a Lightning checkpoint says of its model if it is not as billhook writes it, or not what its weights are.

    Args:
        held: What it says.
        state: Its weights by name, as far as it holds them.

    Raises:
        ValueError: With what is wrong.
    """
    for key, kind in KINDS.items():
        if not isinstance(held, Mapping) or not isinstance(held.get(key), kind):
            raise ValueError(f"the checkpoint does not say what model it holds as billhook writes it: {key} is missing or wrong")
    assert isinstance(held, Mapping)
    if held.get("version", VERSION) != VERSION:
        raise ValueError(f"the checkpoint was written by another billhook (version {str(held['version'])[:80]} of what it says)")
    try:
        config = json.loads(held["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the checkpoint does not say what model it holds as billhook writes it: config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("the checkpoint does not say what model it holds as billhook writes it: config is no mapping")
    check_plain_shape(held["shape"])
    weights = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    unheld = 0
    for name, size in held["shape"]["tensors"].items():
        found = weights.get(held["prefix"] + name)
        if found is not None and found != tuple(size):
            raise ValueError(f"the checkpoint says that {name} is {tuple(size)}, and holds it as {found}")
        unheld += prod(size) if found is None else 0
    if weights and unheld > 10**8 + 10 * sum(map(prod, weights.values())):
        raise ValueError(f"the checkpoint says that there are {unheld} numbers, of which it holds none")


def _is_size(said: object) -> bool:
    return isinstance(said, list | tuple) and len(said) <= DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in said)


def _is_whole(said: object) -> bool:
    return isinstance(said, int) and abs(said) < 2**63


def _is_plain_list(said: object) -> bool:
    return isinstance(said, list) and all(value is None or isinstance(value, bool | int | float | str) for value in said)


def _are_blocks(said: object) -> bool:
    if not isinstance(said, list) or len(said) != 2 or type(said[0]) is not int or not isinstance(said[1], list | tuple):
        return False
    first, there = said
    return all(type(n) is int and 0 <= n < first for n in there) and list(there) == sorted(set(there))
