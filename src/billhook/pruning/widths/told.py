"""Tells which multiples rows have become, and what other lengths would cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from billhook.units.units import PLURAL, UnitKind

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
