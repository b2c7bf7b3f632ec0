"""Shared style of plots: colors, axes, and labels."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

RED, BLUE = "#b03a2e", "#1f5f8b"
PLOT_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
"""File name endings of plots."""


class Plot(Figure):
    """A figure that notebooks display although pyplot did not create it."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue(), {"width": round(80 * self.get_figwidth())}


def style_axes(axes: Axes) -> None:
    """Shows a grid and only the left and bottom spines."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Axes, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Sets a logarithmic y axis with plain numbers, such as 1, 2, 5, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def metric_label(metric: str) -> str:
    """Returns the label of a logged metric.

    >>> metric_label("val_perplexity")
    'validation perplexity'
    """
    return metric.replace("val_", "validation ").replace("_", " ")


def distinct_parts(names: Sequence[str]) -> list[str]:
    """Shortens names by removing their common beginning and end.

    >>> distinct_parts(["model.layers.0.mlp", "model.layers.1.mlp"])
    ['0', '1']
    """
    parts_of = [name.split(".") for name in names]
    min_length = min(map(len, parts_of)) - 1
    start = _first_difference(list(zip(*parts_of, strict=False))[:min_length], 0)
    end = _first_difference(list(zip(*map(reversed, parts_of), strict=False))[: min_length - start], min_length - start)
    return [".".join(parts[start : len(parts) - end]) for parts in parts_of]


def _first_difference(columns: Sequence[tuple[str, ...]], default: int) -> int:
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), default)


def heat_map(
    axes: Axes, table: NDArray[Any], names: Sequence[str], label: str, least: float | None = None, most: float | None = None
) -> None:
    """Draws a table `[rows, columns]` as colors with a color bar; NaN stays blank.

    Args:
        axes: Axes to draw on.
        table: Values.
        names: Row names; their common beginning and end are left out.
        label: Label of the color bar.
        least: Value of the lightest color. Defaults to the minimum.
        most: Value of the darkest color. Defaults to the maximum.
    """
    image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=least, vmax=most)
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    axes.set_yticks(range(len(table)), distinct_parts(names), fontsize=max(4, min(8, 200 // len(table))))
