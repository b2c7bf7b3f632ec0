"""A picture of what a model loses at each size, with the chosen one."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from billhook.arguments import annotated
from billhook.plots.style import BLUE, RED, Picture, dress
from billhook.shrinking.divergence import mean_of
from billhook.shrinking.shrunk import Shrunk

LABELS = {
    "params": "parameters",
    "bytes": "bytes of parameters",
    "kv_cache_bytes": "bytes of key/value cache per token",
    "latency": "milliseconds of the workload",
}
MARKERS = "sD^"


def pareto(shrunk: Shrunk) -> Picture:
    """Draws what a model loses over what is left of it: KL divergence from the dense model, of the chosen size and of others.

    Drawn are models put together of places that were refitted one by one, the sums of what places lose alone, the chosen model as
    repaired, and for comparison the dense model, and models from which units of one kind alone were removed. A line stands at the
    budget, unless that is one of quality.

    Args:
        shrunk: What `bh.shrink` returns.

    Raises:
        ValueError: If it is something else.
    """
    annotated(pareto, locals())
    figure = Picture(figsize=(6, 4), dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    unit = 1e6 if shrunk.target == "latency" else 1
    left = [one.left / unit for one in shrunk.curve]
    measured = [one.measured for one in shrunk.curve]
    axes.plot(left, measured, "o-", color=BLUE, linewidth=1.4, markersize=4, label="refitted module by module")
    predicted = [one.predicted for one in shrunk.curve]
    axes.plot(left, predicted, "--", color="0.5", linewidth=1, label="sum of what modules lose alone")
    for (name, point), marker in zip(shrunk.alone.items(), MARKERS, strict=False):
        axes.plot(
            point[0] / unit, point[1], marker, color="#7d6608", markersize=6, fillstyle="none", label=f"only {name} removed"
        )
    dense = [one for one in shrunk.curve if one.kept == {name: before for name, (before, _) in shrunk.kept.items()}]
    for one in dense[-1:]:
        axes.plot(one.left / unit, one.measured, "o", color="black", markersize=6, label="dense model")
    if shrunk.ratio is None:
        axes.axvline(shrunk.limit / unit, color=RED, linestyle=":", linewidth=1, label="budget", zorder=1)
    axes.plot(shrunk.left / unit, mean_of(shrunk.measured), "*", color=RED, markersize=12, label="chosen, repaired as a whole")
    axes.set(xlabel=f"{LABELS.get(shrunk.target, shrunk.target)} left", ylim=(0, None))
    axes.set_ylabel("KL divergence from the dense model, nats")
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
