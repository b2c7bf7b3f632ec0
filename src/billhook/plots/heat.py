"""A heat map with named rows."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from numpy.typing import NDArray

from billhook.plots.style import distinct


def heat_map(
    axes: Axes, table: NDArray[Any], names: Sequence[str], label: str, least: float | None = None, most: float | None = None
) -> None:
    """Draws a table `[rows, columns]` as colours, with a bar that says what they mean; NaN stays blank.

    Args:
        axes: Where it is drawn.
        table: The values.
        names: The rows' names; what they share at the beginning and the end is left out.
        label: What the values are.
        least: The value of the lightest colour; by default the least there is.
        most: The value of the darkest colour; by default the greatest there is.
    """
    shown = axes.imshow(table, aspect="auto", cmap="Blues", vmin=least, vmax=most)
    figure: Any = axes.figure
    figure.colorbar(shown, ax=axes, label=label, shrink=0.8)
    axes.set_yticks(range(len(table)), distinct(names), fontsize=max(4, min(8, 200 // len(table))))
