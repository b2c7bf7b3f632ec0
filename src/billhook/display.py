"""Lines and tables as text, in a notebook, and as Markdown, drawn by rich."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.jupyter import JupyterMixin
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

COLUMNS = 130  # width of printed output; longer lines are wrapped
UNLIMITED = 100_000
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Table style with only a line below the header, of a character that every terminal has."""


def text_table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), aligns: str = "<>", indent: int = 0) -> RenderableType:
    """Returns a table.

    Args:
        rows: Rows of cells, one cell per column.
        head: Column headers. Defaults to none.
        aligns: Alignment of each column, "<" (left) or ">" (right). The last one applies to all further columns.
        indent: Number of spaces before each row.
    """
    table = Table(box=RULE if head else None, show_header=bool(head), show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    if head:
        table.padding = (0, 1, 0, 0)  # the box has a blank between columns
    cells = [[Text(str(cell)) for cell in row] for row in rows]  # `Text`, because brackets in a string would be markup
    count = len(head) or max(map(len, cells), default=0)
    sides = [aligns[min(number, len(aligns) - 1)] for number in range(count)]
    # a table that is too wide wraps its last column of text, or else its first, so that numbers stay in one piece
    wrapped = count - 1 if sides[-1:] == ["<"] or "<" not in sides else sides.index("<")
    for number, side in enumerate(sides):
        name = Text(head[number] if head else "")
        table.add_column(name, justify="left" if side == "<" else "right", overflow="fold", no_wrap=number != wrapped)
    for row in cells:
        table.add_row(*row)
    return Padding.indent(table, indent) if indent else table


def render(*parts: RenderableType, width: int = COLUMNS) -> str:
    """Renders lines and tables as text.

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
    """Renders a table as text of any width; see `text_table`."""
    return render(text_table(rows, head, aligns), width=UNLIMITED)


def some(names: Sequence[str], most: int = 6) -> str:
    """Returns the first names, and how many others there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Printable(JupyterMixin, ABC):
    """Base class for objects displayed as lines and tables, by `print`, notebooks, and rich."""

    @abstractmethod
    def _renderables(self) -> Iterable[RenderableType]:
        """Returns the lines and tables to display."""

    def text(self) -> str:
        """Returns the printed text without wrapping lines."""
        return render(*self._renderables(), width=UNLIMITED)

    def __str__(self) -> str:
        return render(*self._renderables())

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        """Renders the object at the width of a terminal or notebook."""
        for part in self._renderables():
            yield Text(part) if isinstance(part, str) else part
