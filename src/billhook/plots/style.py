"""How all pictures look: their colours, edges and the names under their axes."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

RED, BLUE = "#b03a2e", "#1f5f8b"
PLOT_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
"""How the path of a picture may end."""


class Plot(Figure):
    """A figure that notebooks show by itself; of others they show only those that pyplot made."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue(), {"width": round(80 * self.get_figwidth())}


def style_axes(axes: Axes) -> None:
    """Shows a grid, and only the left and the lower edge."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Axes, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Has a logarithmic scale of plain numbers, such as 1, 2, 5, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def metric_label(metric: str) -> str:
    """Returns the words for a logged figure.

    >>> metric_label("val_perplexity")
    'validation perplexity'
    """
    return metric.replace("val_", "validation ").replace("_", " ")


def distinct_parts(names: Sequence[str]) -> list[str]:
    """Shortens names by their common beginning and end.

    >>> distinct_parts(["model.layers.0.mlp", "model.layers.1.mlp"])
    ['0', '1']
    """
    split = [name.split(".") for name in names]
    least = min(map(len, split)) - 1
    start = next((i for i in range(least) if len({parts[i] for parts in split}) > 1), 0)
    end = next((i for i in range(least - start) if len({parts[-1 - i] for parts in split}) > 1), least - start)
    return [".".join(parts[start : len(parts) - end]) for parts in split]


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
    axes.set_yticks(range(len(table)), distinct_parts(names), fontsize=max(4, min(8, 200 // len(table))))
