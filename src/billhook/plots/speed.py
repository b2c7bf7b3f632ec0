"""A picture of the speed of models over contexts, and of their speed-up next to the ideal one."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from billhook.plots.style import Plot, log_scale, style_axes
from billhook.report.speed import Timing, spread

COLOURS = ("#1f5f8b", "#b03a2e", "#3c8d40", "#8e5ea2", "#d0812a", "#5a5a5a")
MARKERS = "os^Dvx*"


def speed(rows: Sequence[Timing], names: Sequence[str]) -> Plot:
    """Draws tokens per second over contexts for each phase; for several models also the speed-up, the ideal one dashed.

    Bars are quartiles. A colour is a model, a marker a batch size.

    Args:
        rows: What `billhook.report.speed.measure_speed` returns, as `billhook bench` does it.
        names: The models' names.
    """
    phases = list(dict.fromkeys(row.phase for row in rows))
    columns = 2 if len(names) > 1 else 1
    figure = Plot(figsize=(1 + 4.5 * columns, 0.8 + 3.2 * len(phases)), dpi=150, layout="constrained")
    panels = figure.subplots(len(phases), columns, squeeze=False)
    for phase, (speeds, *others) in zip(phases, panels, strict=True):
        _draw_speeds(speeds, [row for row in rows if row.phase == phase], names)
        speeds.set(title=phase, ylabel="tokens per second")
        log_scale(speeds)
        for axes in others:
            _draw_ratios(axes, [row for row in rows if row.phase == phase and row.model])
            axes.set(title=f"{phase} against {names[0]}, dashed: ideal", ylabel="times as fast", ylim=(0, None))
    contexts = sorted({row.context for row in rows})
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.set_xlabel("context, tokens")
        style_axes(axes)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _curves(rows: Sequence[Timing]) -> list[tuple[list[Timing], dict[str, Any]]]:
    """Groups rows by model and batch size, ordered by context, each with its style."""
    batches = sorted({row.batch_size for row in rows})
    curves = dict[tuple[int, int], list[Timing]]()
    for row in sorted(rows, key=lambda row: row.context):
        curves.setdefault((row.model, row.batch_size), []).append(row)
    styled = []
    for (model, batch), curve in sorted(curves.items()):
        style = {"color": COLOURS[model % len(COLOURS)], "marker": MARKERS[batches.index(batch) % len(MARKERS)], "markersize": 4}
        styled.append((curve, style))
    return styled


def _draw_speeds(axes: Axes, rows: Sequence[Timing], names: Sequence[str]) -> None:
    for curve, style in _curves(rows):
        points = []
        for row in curve:
            fast, slow = (row.tokens_per_second * row.median / seconds for seconds in spread(row.seconds))
            points.append((row.context, row.tokens_per_second, slow, fast))
        _bars(axes, points, style | {"label": f"{names[curve[0].model]}, batch {curve[0].batch_size}"})


def _draw_ratios(axes: Axes, rows: Sequence[Timing]) -> None:
    for curve, style in _curves(rows):
        _bars(axes, [(row.context, row.speed_up, *spread(row.ratios)) for row in curve], style)
        ideal = [(row.context, row.ideal) for row in curve if row.ideal is not None]
        if ideal:
            axes.plot(*zip(*ideal, strict=True), **style, linestyle="--", linewidth=1, markerfacecolor="none")
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=1)


def _bars(axes: Axes, points: Sequence[tuple[float, float, float, float]], style: dict[str, Any]) -> None:
    """Draws points of a context and a value, with bars from the lower to the upper quartile."""
    contexts, values, low, high = zip(*points, strict=True)
    down = [max(value - least, 0) for value, least in zip(values, low, strict=True)]
    up = [max(most - value, 0) for value, most in zip(values, high, strict=True)]
    axes.errorbar(contexts, values, yerr=[down, up], capsize=2, linewidth=1.4, **style)
