"""A picture of what a model loses at each size, with the chosen one."""

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from billhook.arguments import check_types
from billhook.plots.style import BLUE, RED, Plot, style_axes
from billhook.shrinking.divergence import mean_of
from billhook.shrinking.shrunk import Shrunk

LABELS = {
    "params": "parameters",
    "bytes": "bytes of parameters",
    "kv_cache_bytes": "bytes of key/value cache per token",
    "latency": "milliseconds of the workload",
}
MARKERS = "sD^"


def pareto(shrunk: Shrunk) -> Plot:
    """Draws what a model loses over what is left of it: KL divergence from the dense model, of the chosen size and of others.

    Drawn are models put together of places that were refitted one by one, the sums of what places lose alone, the chosen model as
    repaired, and for comparison the dense model, and models from which units of one kind alone were removed. A line stands at the
    budget, unless that is one of quality.

    Args:
        shrunk: What `bh.shrink` returns.

    Raises:
        ValueError: If it is something else.
    """
    check_types(pareto, locals())
    figure = Plot(figsize=(6, 4), dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    unit = 1e6 if shrunk.target == "latency" else 1
    points = [(choice.left / unit, choice.measured, choice.predicted) for choice in shrunk.curve]
    left, measured, predicted = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(left, measured, "o-", color=BLUE, linewidth=1.4, markersize=4, label="refitted module by module")
    axes.plot(left, predicted, "--", color="0.5", linewidth=1, label="sum of what modules lose alone")
    for (name, (size, lost)), marker in zip(shrunk.alone.items(), MARKERS, strict=False):
        axes.plot(size / unit, lost, marker, color="#7d6608", markersize=6, fillstyle="none", label=f"only {name} removed")
    all_units = {name: before for name, (before, _) in shrunk.kept.items()}
    for dense in [choice for choice in shrunk.curve if choice.kept == all_units][-1:]:
        axes.plot(dense.left / unit, dense.measured, "o", color="black", markersize=6, label="dense model")
    if shrunk.ratio is None:
        axes.axvline(shrunk.limit / unit, color=RED, linestyle=":", linewidth=1, label="budget", zorder=1)
    axes.plot(shrunk.left / unit, mean_of(shrunk.measured), "*", color=RED, markersize=12, label="chosen, repaired as a whole")
    axes.set(xlabel=f"{LABELS.get(shrunk.target, shrunk.target)} left", ylim=(0, None))
    axes.set_ylabel("KL divergence from the dense model, nats")
    plain = FuncFormatter(lambda value, _: f"{value:,g}")  # milliseconds, of which `m` would make thousandths
    axes.xaxis.set_major_formatter(plain if shrunk.target == "latency" else EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    return figure
