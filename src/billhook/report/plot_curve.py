"""A picture of what a model loses at each size, with the chosen one."""

from collections.abc import Mapping, Sequence
from typing import Any

from billhook.report.plot import dress

LABELS = {
    "params": "parameters",
    "bytes": "bytes of parameters",
    "kv_cache_bytes": "bytes of key/value cache per token",
    "latency": "nanoseconds of the workload",
}
MARKERS = "sD^"
Point = tuple[int, float]
"""What is left, and the KL divergence from the dense model."""


def plot_curve(
    target: str, put_together: Sequence[Point], predicted: Sequence[Point], chosen: Point, alone: Mapping[str, Point]
) -> Any:  # noqa: ANN401
    """Draws KL divergence over what is left of what a budget limits.

    Args:
        target: What the budget limits.
        put_together: Measured, of places that were refitted one by one.
        predicted: Sums of what places lose alone.
        chosen: The chosen model, as repaired.
        alone: By the name of a kind of unit, the model without units of this kind alone.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *zip(*put_together, strict=True), "o-", color="#1f5f8b", linewidth=1.4, markersize=4, label="refitted place by place"
    )
    axes.plot(*zip(*predicted, strict=True), "--", color="0.5", linewidth=1, label="sum of what places lose alone")
    for (name, point), marker in zip(alone.items(), MARKERS, strict=False):
        axes.plot(*point, marker, color="#7d6608", markersize=6, fillstyle="none", label=f"without {name} alone")
    axes.plot(*chosen, "*", color="#b03a2e", markersize=12, label="chosen, repaired as a whole")
    axes.set(xlabel=f"{LABELS.get(target, target)} left", ylabel="KL divergence from the dense model, nats", ylim=(0, None))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.legend(frameon=False, fontsize=8)
    dress(axes)
    return figure


def _short(value: float) -> str:
    """Shortens a number.

    >>> _short(134_515_008), _short(2_500), _short(12)
    ('134.5M', '2.5K', '12')
    """
    unit, size = next(((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)) if abs(value) >= size), ("", 1))
    return f"{value / size:.4g}{unit}"
