"""Plot of the loss at each size, with the selected model."""

from matplotlib.ticker import EngFormatter

from billhook.arguments import check_types
from billhook.plots.style import BLUE, RED, Plot, style_axes
from billhook.shrinking.divergence import mean_over_sources
from billhook.shrinking.result import Shrunk

LABELS = {"params": "parameters", "bytes": "bytes of parameters"}


def pareto(shrunk: Shrunk) -> Plot:
    """Plots KL divergence from the dense model over size, for the selected and other sizes.

    Shows models assembled from separately refitted modules, their estimated loss, and the dense model. The selected model is
    shown as saved, after the repair of the whole model, so it lies below the curve. A vertical line marks the budget, unless it
    is a quality budget.

    Args:
        shrunk: Result of `bh.shrink`.

    Raises:
        ValueError: If it is anything else.
    """
    check_types(pareto, locals())
    figure = Plot(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    points = [(choice.left, choice.measured, choice.predicted) for choice in shrunk.curve]
    left, measured, predicted = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(left, measured, "o-", color=BLUE, linewidth=1.4, markersize=4, label="measured, before the whole model is repaired")
    axes.plot(left, predicted, "--", color="0.5", linewidth=1, label="estimated (sum over modules)")
    all_units = {name: before for name, (before, _) in shrunk.kept.items()}
    for choice in reversed(shrunk.curve):
        if choice.kept == all_units:
            axes.plot(choice.left, choice.measured, "o", color="black", markersize=6, label="dense model")
            break
    if shrunk.ratio is None:
        axes.axvline(shrunk.limit, color=RED, linestyle=":", linewidth=1, label="budget", zorder=1)
    axes.plot(shrunk.left, mean_over_sources(shrunk.measured), "*", color=RED, markersize=12, label="selected, as saved")
    axes.set(
        xlabel=LABELS[shrunk.target],
        ylabel="KL divergence from the dense model, nats",
        ylim=(min((0, *measured, *predicted)), None),
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    return figure
