"""Shows of an object a page, however large the model that it tells of."""

import re
import textwrap
from abc import ABC, abstractmethod

LINES = 40
COLUMNS = 130


def page(text: str) -> str:
    """Returns a text of at most 40 lines and 130 columns: long lines go on below, and lines in the middle are left out.

    >>> shown = page(chr(10).join(f"layer {number}" for number in range(100))).splitlines()
    >>> len(shown), shown[27:29]
    (40, ['layer 27', '... 61 lines more are in text()'])
    """
    lines = [part for line in text.splitlines() for part in _broken(line)]
    if len(lines) <= LINES:
        return "\n".join(lines)
    last = LINES // 4 + 1
    first = LINES - last - 1
    return "\n".join([*lines[:first], f"... {len(lines) - first - last} lines more are in text()", *lines[-last:]])


def _broken(line: str) -> list[str]:
    """Breaks a line where it is too long; what goes on below is set in."""
    if len(line) <= COLUMNS:
        return [line]
    indent = re.match(" *", line)[0] + " " * 4  # type: ignore[index]  # this always matches
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


class Shown(ABC):
    """An object that `print`, and a notebook whose cell ends with it, show a page of."""

    @abstractmethod
    def text(self) -> str:
        """Returns everything that is to be shown, however long it is."""

    def __str__(self) -> str:
        return page(self.text())

    def __repr__(self) -> str:
        return str(self)
