"""Plot of speed over context length, and of speedup next to the ideal."""

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from billhook.plots.style import Plot, log_scale, style_axes
from billhook.report.speed import Timing, spread

COLORS = ("#1f5f8b", "#b03a2e", "#3c8d40", "#8e5ea2", "#d0812a", "#5a5a5a")
MARKERS = "os^Dvx*"


def speed(rows: Sequence[Timing], names: Sequence[str]) -> Plot:
    """Plots tokens per second over context length, and the speedup of several models.

    Error bars are quartiles, and the ideal speedup is dashed. A color is a model; a marker is a batch size.

    Args:
        rows: Results of `billhook.report.speed.measure_speed`, as used by `billhook bench`.
        names: Names of the models.
    """
    phases = list(dict.fromkeys(map(attrgetter("phase"), rows)))
    columns = 2 if len(names) > 1 else 1
    figure = Plot(figsize=(1 + 4.5 * columns, 0.8 + 3.2 * len(phases)), dpi=150, layout="constrained")
    panels = figure.subplots(len(phases), columns, squeeze=False)
    for phase, (speeds, *others) in zip(phases, panels, strict=True):
        rows_of_phase = sorted((row for row in rows if row.phase == phase), key=attrgetter("context"))
        sizes = sorted({row.batch_size for row in rows_of_phase})
        by_model = defaultdict(list)
        for row in rows_of_phase:
            by_model[row.model, row.batch_size].append(row)
        curves = []  # each with its line style
        for (model, size), curve in sorted(by_model.items()):
            marker = MARKERS[sizes.index(size) % len(MARKERS)]
            curves.append((curve, {"color": COLORS[model % len(COLORS)], "marker": marker, "markersize": 4}))
        for curve, style in curves:
            points = []
            for row in curve:
                fast, slow = (row.tokens_per_second * row.median / seconds for seconds in spread(row.seconds))
                points.append((row.context, row.tokens_per_second, slow, fast))
            _bars(speeds, points, style | {"label": f"{names[curve[0].model]}, batch {curve[0].batch_size}"})
        speeds.set(title=phase, ylabel="tokens per second")
        log_scale(speeds)
        for axes in others:
            for curve, style in curves:
                if curve[0].model == 0:  # the baseline
                    continue
                _bars(axes, [(row.context, row.speed_up, *spread(row.ratios)) for row in curve], style)
                ideal = [(row.context, row.ideal) for row in curve if row.ideal is not None]
                if ideal:
                    axes.plot(*zip(*ideal, strict=True), **style, linestyle="--", linewidth=1, markerfacecolor="none")
            axes.axhline(1, color="0.6", linewidth=0.8, zorder=1)
            axes.set(title=f"{phase}: speedup over {names[0]} (dashed: ideal)", ylabel="speedup", ylim=(0, None))
    contexts = sorted(set(map(attrgetter("context"), rows)))
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.set_xlabel("context length (tokens)")
        style_axes(axes)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _bars(axes: Axes, points: Sequence[tuple[float, float, float, float]], style: dict[str, Any]) -> None:
    """Draws points with error bars from the lower to the upper quartile."""
    contexts, values, low, high = np.array(points).T
    errors = np.maximum([values - low, high - values], 0)
    axes.errorbar(contexts, values, yerr=errors, capsize=2, linewidth=1.4, **style)
