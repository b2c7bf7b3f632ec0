"""Divides batches into those that are fitted to and those that damage is measured on."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from billhook.engine.batches import Batch, source_of
from billhook.engine.trees import tree_leaves, tree_map_only
from billhook.repairs.repair import Repair

SHARE = 0.2
"""Share of the batches of each source that is held out at most."""
TOKENS = 4096
"""How many tokens damage is measured on at most, of all sources together: each of some hundred variants runs on all of them."""
PER_INPUT = 10
"""How many tokens variants are fitted to at most for each input of the widest linear that is refitted."""


def divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Divides batches, the held-out ones spread evenly over those of each source, no more than are measured.

    Where there are too few, they are taken apart into rows; too few rows are refused.
    """
    numbers = _by_source(batches)
    if _too_few(numbers):
        batches = in_rows(batches)
        numbers = _by_source(batches)
    if _too_few(numbers):
        found = ", ".join(f"{len(own)}{f' of {source}' if source else ''}" for source, own in numbers.items())
        raise ValueError(f"batches: three rows at least, and two of each source, as some are held out; got {found or 'none'}")
    held_out = {own[place] for own in numbers.values() for place in Repair(held_out=SHARE).chooses(len(own))}
    measured = few([batches[number] for number in sorted(held_out)])
    left_over = [number for number, used in zip(sorted(held_out), measured, strict=True) if used is None]
    fitted = [batch for number, batch in enumerate(batches) if number not in held_out or number in left_over]
    return fitted, [batch for batch in measured if batch is not None]


def in_rows(batches: Sequence[Any]) -> list[Any]:
    """Takes batches apart into rows."""
    return [_rows(batch, row, row + 1) for batch in batches for row in range(_size(batch)[0])]


def _by_source(batches: Sequence[Any]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, batch in enumerate(batches):
        numbers.setdefault(source_of(batch), []).append(number)
    return numbers


def _too_few(numbers: Mapping[str, Sequence[int]]) -> bool:
    return sum(map(len, numbers.values())) < 3 or any(len(own) < 2 for own in numbers.values())


def few(batches: Sequence[Any], tokens: int = TOKENS) -> list[Any | None]:
    """Returns the first rows of each source's batches, as many as come to an equal share of so many tokens, one at least.

    None stands for batches of which none is taken.

    >>> import torch
    >>> [one and tuple(one["input_ids"].shape) for one in few([{"input_ids": torch.zeros(4, 100)}] * 3, 600)]
    [(4, 100), (2, 100), None]
    """
    share = tokens // max(len({source_of(batch) for batch in batches}), 1)
    left: dict[str, int] = {}
    found = list[Any | None]()
    for batch in batches:
        source = source_of(batch)
        count, length = _size(batch)
        rows = min(max(left.get(source, share) // length, 0), count) or int(source not in left)
        found.append(None if not rows else batch if rows == count else _rows(batch, 0, rows))
        left[source] = left.get(source, share) - rows * length
    return found


def to_search(batches: Sequence[Any], widest: int) -> list[Any]:
    """Returns the batches that variants are scored on and fitted to; what is chosen is repaired on all.

    Args:
        batches: All batches that something may be fitted to.
        widest: Inputs of the widest linear that is refitted.
    """
    found = [batch for batch in few(batches, PER_INPUT * widest) if batch is not None]
    return found if len(found) > 1 else list(batches)


def _size(batch: Any) -> tuple[int, int]:  # noqa: ANN401
    """Returns how many rows a batch has, and how many tokens a row."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    shapes = [leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = max((shape[0] for shape in shapes), default=1)
    return rows, max((shape[1] for shape in shapes if len(shape) == 2), default=1)


def _rows(batch: Any, start: int, stop: int) -> Any:  # noqa: ANN401
    """Returns some rows of a batch; what has one row, as positions may, stays."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    cut = tree_map_only(Tensor, lambda tensor: tensor[start:stop] if tensor.dim() and len(tensor) > 1 else tensor, inputs)
    return Batch(cut, source_of(batch)) if isinstance(batch, Batch) else cut
