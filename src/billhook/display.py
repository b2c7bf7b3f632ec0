"""Lines and tables, drawn by rich: as text, in a notebook, and as Markdown."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.jupyter import JupyterMixin
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

COLUMNS = 130
"""Columns of what `print` shows; what is longer goes on below."""
UNLIMITED = 100_000
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Nothing but a rule below the heads, of a character that every terminal has."""


def text_table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), aligns: str = "<>", indent: int = 0) -> RenderableType:
    """Returns a table.

    Args:
        rows: Cells, one for each column.
        head: The heads of the columns; none, for a table without.
        aligns: For each column "<", on the left, or ">", on the right; the last holds of all others.
        indent: Spaces before each row.
    """
    table = Table(box=RULE if head else None, show_header=bool(head), show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    if head:
        table.padding = (0, 1, 0, 0)  # the box itself has a blank between columns
    cells = [[Text(str(cell)) for cell in row] for row in rows]  # `Text`, as brackets in a string would be markup
    count = len(head) or max(map(len, cells), default=0)
    sides = [aligns[min(number, len(aligns) - 1)] for number in range(count)]
    # where the table is too wide, its last column of words gives way, or else its first: numbers stay whole
    giving = count - 1 if sides[-1:] == ["<"] or "<" not in sides else sides.index("<")
    for number, side in enumerate(sides):
        name = Text(head[number] if head else "")
        table.add_column(name, justify="left" if side == "<" else "right", overflow="fold", no_wrap=number != giving)
    for row in cells:
        table.add_row(*row)
    return Padding.indent(table, indent) if indent else table


def render(*parts: RenderableType, width: int = COLUMNS) -> str:
    """Draws lines and tables as text.

    >>> print(render("zeros by stage", text_table([["dense", "0"], ["pruned", "1,024"]], ["", "zeros"], indent=2)))
    zeros by stage
              zeros
      -------------
      dense       0
      pruned  1,024
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def render_table(head: Sequence[str], rows: Iterable[Sequence[object]], aligns: str = "<>") -> str:
    """Draws a table as text, however wide it is; see `text_table`."""
    return render(text_table(rows, head, aligns), width=UNLIMITED)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Draws a table as Markdown, whose cells must be escaped; all columns but the first are aligned by `align`.

    >>> print(markdown_table(["", "zeros"], [["dense", 0], ["pruned", "1,024"]], "---:"))
    |  | zeros |
    | --- | ---: |
    | dense | 0 |
    | pruned | 1,024 |
    """
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class Printable(JupyterMixin, ABC):
    """An object that `print`, a notebook whose cell ends with it, and rich show as lines and tables."""

    @abstractmethod
    def _renderables(self) -> Iterable[RenderableType]:
        """Returns the lines and tables that are shown."""

    def text(self) -> str:
        """Returns what `print` shows, with lines as long as they are."""
        return render(*self._renderables(), width=UNLIMITED)

    def __str__(self) -> str:
        return render(*self._renderables())

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        """Draws it in a terminal or a notebook, as wide as that is."""
        for part in self._renderables():
            yield Text(part) if isinstance(part, str) else part
