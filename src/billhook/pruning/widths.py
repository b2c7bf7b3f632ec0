"""Numbers of units that quantisers, kernels and engines like: how they are rounded to them, and what other numbers cost."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.serving.readings import GPUS, MULTIPLES, multiple_of, shares
from billhook.units.units import PLURAL, Per, UnitKind, Units

RoundTo = int | Literal["auto"]
PERCENT = 3
"""So much of the units that there were may stay more or fewer than was asked for."""


def rounded(
    asked: int, first: int, most: int | None = None, least: int = 1, each: int = 1, step: int = 1, more: bool = True
) -> int | None:
    """Returns how many units stay instead of so many: as many as make rows a multiple of the largest of `MULTIPLES` near enough.

    Of each multiple the nearest number counts, and it is near enough if it differs from what was asked for by at most 3 % of the
    units that there were at first. Where rows were shorter than 256, or no multiple is near enough, there is none.

    Args:
        asked: How many are asked for.
        first: How many there were at first; fewer stay.
        most: The most that may stay; by default all but one.
        least: The fewest that may stay.
        each: The length of one unit in a row, as the width of a head.
        step: The number that units must be a multiple of.
        more: Whether more may stay than was asked for.

    >>> rounded(1229, 1536), rounded(1300, 1536), rounded(1300, 1536, more=False), rounded(30, 40, each=128)
    (1216, 1280, 1280, 30)
    >>> rounded(308, 384), rounded(72, 96)
    (None, None)
    """
    if first * each < MULTIPLES[0]:
        return None
    bounds = least, first - 1 if most is None else min(most, first - 1)
    for multiple in MULTIPLES:
        found = nearest(asked, _units(multiple, each, step), *bounds, more)
        if found is not None and 100 * abs(found - asked) <= PERCENT * first:
            return found
    return None


def nearest(asked: int, step: int, least: int, most: int, more: bool = True) -> int | None:
    """Returns the multiple of a step within bounds that is nearest to a number, the higher of two; None if there is none.

    >>> nearest(1229, 256, 1, 1535), nearest(1229, 256, 1, 1535, more=False), nearest(24, 16, 1, 47), nearest(24, 64, 1, 47)
    (1280, 1024, 32, None)
    """
    below = asked // step * step
    options = [number for number in (below + step, below) if least <= number <= most and (more or number <= asked)]
    return min(options, key=lambda number: abs(number - asked), default=None)


def others(asked: int, kept: int, now: int, least: int = 1) -> dict[int, int]:
    """Returns the nearest multiples of `MULTIPLES` that were not taken, each with the largest that it is a multiple of.

    >>> others(1229, 1216, 1536)
    {1280: 256}
    """
    near = [nearest(asked, multiple, least, now - 1) for multiple in MULTIPLES]
    return {number: multiple_of(number) for number in near if number is not None and number != kept}


def finest(count: int) -> int:
    """Returns the largest of `MULTIPLES` to which any number of so many units can be rounded down; 1 if none is so small.

    >>> finest(11008), finest(1536), finest(384)
    (256, 32, 1)
    """
    return next((multiple for multiple in MULTIPLES if 100 * multiple <= PERCENT * count), 1)


def length_of(units: Units, per: Per = "head") -> int:
    """Returns how much of a row one unit takes: of heads as many as they are wide; 0 where rows are of something else."""
    if units.kind in ("channel", "residual"):
        return 1
    return int((units.index >= 0).sum()) // units.count(per) if units.kind == "head" else 0


def _units(multiple: int, each: int, step: int) -> int:
    """Returns the number of units whose multiples make rows a multiple."""
    return math.lcm(multiple // math.gcd(multiple, each), step)


OTHER = ("units", "multiple", "more_parameters")
"""What plain data calls the numbers of another length."""


@dataclass(frozen=True)
class RowLength:
    """How long rows have become where units were removed; `print` shows a line.

    Attributes:
        kind: The kind of the units.
        places: In how many places.
        each: The length of one unit in a row, as the width of a head.
        asked: How many units were asked for.
        kept: How many stay.
        multiple: The largest of 256, 128, 64 and 32 that the rows are a multiple of; 1 if they are of none.
        others: Numbers of units that could stay instead, of which multiple rows would be then, and how many parameters the model
            would have more.
    """

    kind: UnitKind
    places: int
    each: int
    asked: int
    kept: int
    multiple: int
    others: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return vars(self) | {"others": [dict(zip(OTHER, other, strict=True)) for other in self.others]}

    def __str__(self) -> str:
        rows = "" if self.each == 1 else f" (head dimension {self.each}), rows of {self.kept * self.each:,}"
        by = f"a multiple of {self.multiple}" if self.multiple > 1 else "no multiple of 32 is near enough"
        asked = [] if self.asked == self.kept else [f"{self.asked:,} were asked for"]
        other = [
            f"{units:,} would be a multiple of {multiple}, with {abs(more):,} parameters {'more' if more > 0 else 'fewer'}"
            for units, multiple, more in self.others
        ]
        return "; ".join([f"{self.kept:,} {PLURAL[self.kind]}{rows}: {by}", *asked, *other])


def rows_from(plain: Iterable[Mapping[str, Any]]) -> tuple[RowLength, ...]:
    """Makes row lengths of their plain data; refuses what is none."""
    try:
        return tuple(
            RowLength(**{**row, "others": tuple(tuple(other[name] for name in OTHER) for other in row["others"])})
            for row in plain
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"plan: rows is {str(plain)[:80]!r}, and must be as to_json returns it") from error


def suits(kv_heads: int) -> bool:
    """Tells whether so many KV heads can be divided among 2, 4 and 8 devices.

    >>> [number for number in range(1, 33) if suits(number)]
    [1, 2, 4, 8, 16, 24, 32]
    """
    return all(shares(kv_heads, gpus) for gpus in GPUS)


def suiting(kept: int, count: int, least: int = 1) -> int:
    """Returns the number of KV heads nearest to one that suits, or all of them; the higher of two.

    >>> suiting(7, 8), suiting(3, 8), suiting(26, 32), suiting(2, 3)
    (8, 4, 24, 2)
    """
    options = [number for number in range(count, least - 1, -1) if number == count or suits(number)]
    return min(options, key=lambda number: abs(number - kept))


def unsuited(kv_heads: int) -> str:
    """Returns the words for a number that does not suit."""
    return f"{kv_heads} KV heads cannot be divided among 2, 4 and 8 devices, as 1, 2, 4 or a multiple of 8 can"


def width_step(model: nn.Module, units: Units) -> int:
    """Returns the number that the units must be a multiple of; 1 where no such kernel reads them, or it takes none now."""
    if units.kind not in ("channel", "residual") or not isinstance(model, PreTrainedModel):
        return 1
    for member in units.members:
        module, weight = model.get_submodule(member.name.rpartition(".")[0]), model.get_parameter(member.name)
        if weight.dim() == 3 and {"has_gate", "is_transposed"} <= vars(module).keys():
            step = max(_kernel_bytes() // weight.element_size(), 1)
            grouped = model.get_correct_experts_implementation(None) == "grouped_mm"
            return step if grouped and not units.count() % step else 1
    return 1


@cache
def _kernel_bytes() -> int:
    """Asks torch's kernel, on meta tensors, of which number of bytes rows must be a multiple."""
    for width in range(1, 65):
        rows, weights = (torch.empty(*size, width, dtype=torch.bfloat16, device="meta") for size in ((2,), (2, 64)))
        try:
            ends = torch.empty(2, dtype=torch.int32, device="meta")
            torch.nn.functional.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        except RuntimeError:
            continue
        return 2 * width
    return 1
