"""Plot of the loss at each size, with the selected model."""

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from billhook.arguments import check_types
from billhook.plots.style import BLUE, RED, Plot, style_axes
from billhook.shrinking.divergence import mean_over_sources
from billhook.shrinking.result import Shrunk

LABELS = {
    "params": "parameters",
    "bytes": "bytes of parameters",
    "kv_cache_bytes": "bytes of key/value cache per token",
    "latency": "milliseconds of the workload",
}
MARKERS = "sD^v"


def pareto(shrunk: Shrunk) -> Plot:
    """Plots KL divergence from the dense model over size, for the selected and other sizes.

    Shows models assembled from separately refitted modules, their estimated loss, the dense model, and models with only one kind
    of unit removed. The selected model is shown as saved, after the repair of the whole model, so it lies below the curve. A
    vertical line marks the budget, unless it is a quality budget. If tokens may be removed, losses are increases in bits per
    byte, and other sizes have the selected vocabulary.

    Args:
        shrunk: Result of `bh.shrink`.

    Raises:
        ValueError: If it is anything else.
    """
    check_types(pareto, locals())
    figure = Plot(figsize=(6, 4), dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    unit = 1e6 if shrunk.target == "latency" else 1
    points = [(choice.left / unit, choice.measured, choice.predicted) for choice in shrunk.curve]
    left, measured, predicted = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(left, measured, "o-", color=BLUE, linewidth=1.4, markersize=4, label="measured, before the whole model is repaired")
    axes.plot(left, predicted, "--", color="0.5", linewidth=1, label="estimated (sum over modules)")
    for (name, (size, lost)), marker in zip(shrunk.alone.items(), MARKERS, strict=False):
        axes.plot(
            size / unit, lost, marker, color="#7d6608", markersize=6, fillstyle="none", label=f"{name} only, before the repair"
        )
    all_units = {name: before for name, (before, _) in shrunk.kept.items()}
    for choice in reversed(shrunk.curve):
        if choice.kept == all_units:
            name = "removed tokens alone" if shrunk.tokens else "dense model"
            axes.plot(choice.left / unit, choice.measured, "o", color="black", markersize=6, label=name)
            break
    if shrunk.ratio is None:
        axes.axvline(shrunk.limit / unit, color=RED, linestyle=":", linewidth=1, label="budget", zorder=1)
    axes.plot(shrunk.left / unit, mean_over_sources(shrunk.measured), "*", color=RED, markersize=12, label="selected, as saved")
    axes.set(xlabel=LABELS.get(shrunk.target, shrunk.target), ylim=(min((0, *measured, *predicted)), None))
    name = "increase in bits per byte" if shrunk.per_byte else "KL divergence from the dense model, nats"
    axes.set_ylabel(name)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")  # an engineering prefix `m` would read as milli-milliseconds
    axes.xaxis.set_major_formatter(plain if shrunk.target == "latency" else EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    return figure
