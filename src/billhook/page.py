"""Shows an object as a page of text or a table of HTML, however large the model that it tells of."""

import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from html import escape

ROWS = 40
"""Rows that a table has at most; what is in the middle is left out."""


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Returns a table as HTML; whatever is in its cells is escaped.

    Args:
        caption: The line above it.
        head: The heads of its columns; none, for a table without.
        rows: Cells, one for each column. Those that begin with a digit stand on the right.
        notes: Lines below it.

    >>> html_table("A < B", ["place", "heads"], [["0", "8 -> 6"]], ["chosen on 4 batches"])  # doctest: +NORMALIZE_WHITESPACE
    '<div><table><caption style="text-align: left; caption-side: top">A &lt; B</caption><thead><tr><th
    style="text-align: left">place</th><th style="text-align: left">heads</th></tr></thead><tbody><tr><td
    style="text-align: right">0</td><td style="text-align: right">8 -&gt; 6</td></tr></tbody></table><p>chosen on 4
    batches</p></div>'
    """
    body = [_row(cells, "td") for cells in rows]
    if len(body) > ROWS:
        out = len(body) - ROWS + 1
        body[ROWS // 2 : ROWS // 2 + out] = [f"<tr><td>... {out} rows more are in text()</td></tr>"]
    above = f'<caption style="text-align: left; caption-side: top">{escape(caption)}</caption>'
    heads = f"<thead>{_row(head, 'th')}</thead>" if head else ""
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<div><table>{above}{heads}<tbody>{''.join(body)}</tbody></table>{below}</div>"


def _row(cells: Sequence[str], tag: str) -> str:
    sides = ["right" if tag == "td" and cell[:1].isdigit() else "left" for cell in cells]
    inside = [f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)]
    return f"<tr>{''.join(inside)}</tr>"


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
