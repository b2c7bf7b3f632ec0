"""Rounds numbers of units so that rows of matrices are as long as quantisers and kernels like them."""

import math
from typing import Literal

from billhook.serving.divisible import MULTIPLES, multiple_of
from billhook.units.units import Per, Units

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
