"""Tables of objects as HTML, which notebooks show."""

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
