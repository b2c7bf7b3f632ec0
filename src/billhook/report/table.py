"""Rows of text as a table."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligns columns under their heads, with a rule between.

    Args:
        rows: The heads, then the rows; all have the same number of cells.
        left: How many columns are aligned on the left; the others are aligned on the right.

    >>> print(aligned([["", "zeros"], ["dense", "0"], ["pruned", "1,024"]]))
            zeros
    -------------
    dense       0
    pruned  1,024
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    shown = ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:]])
