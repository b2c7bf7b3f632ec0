"""Shared style of plots: colors, axes, and labels."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
