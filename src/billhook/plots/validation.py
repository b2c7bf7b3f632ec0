"""Plot of a validation metric over the steps of a training run, with events marked."""

import itertools
import math
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from matplotlib.axes import Axes

from billhook.plots.style import BLUE, RED, Plot, log_scale, metric_label, style_axes

CURVE: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.6, "color": BLUE}


def validation(
    history: Sequence[tuple[int, float]],
    events: Sequence[tuple[int, str, float | None, float | None]],
    name: str,
    dense: float | None = None,
) -> Plot:
    """Plots a validation metric over optimizer steps, with events marked.

    Args:
        history: Pairs of step and value. Values that are not finite or exceed 1e100 leave a gap.
        events: Step, description, and the values before and after.
        name: Name of the metric.
        dense: Value of the dense model, drawn as a line.

    >>> from billhook import plots
    >>> history = [(0, 38.6), (100, 52.0), (200, 44.1)]
    >>> figure = plots.validation(history, [(20, "8 -> 4 KV heads", 38.7, 95.2)], "val_perplexity", dense=38.6)
    >>> figure.axes[0].get_ylabel()
    'validation perplexity'
    """
    figure = Plot(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    before = [(step, value) for step, _, value, _ in events if value is not None]
    after = [(step, value) for step, _, _, value in events if value is not None]
    measured = dict([*before, *after])  # these values replace validation values of their steps
    points = [(step, 1, value) for step, value in history if step not in measured]
    points += [(step, 0, value) for step, value in before] + [(step, 2, value) for step, value in after]
    curve = [(step, value if abs(value) < 1e100 else math.nan) for step, _, value in sorted(points)]
    (line,) = axes.plot(*zip(*curve, strict=True), **CURVE) if curve else axes.plot([], [])
    finite = [value for _, value in curve if math.isfinite(value)]
    if finite and min(finite) >= 1 and max(finite) > 5 * min(finite):
        log_scale(axes, (1, 2, 5) if max(finite) < 300 * min(finite) else (1,))
    if dense is not None and abs(dense) < 1e100:
        axes.axhline(dense, color="0.45", linestyle=(0, (6, 4)), linewidth=0.8, zorder=1)
        axes.text(1.005, dense, "dense", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.45")
    axes.set(xlabel="optimizer step", ylabel=metric_label(name))
    axes.margins(x=0.06, y=0.12)
    axes.locator_params(axis="x", integer=True)
    style_axes(axes)
    _mark(axes, [(step, what) for step, what, _, _ in events])
    labels = [(*point, "right") for point in (*curve[-1:], *curve[:1], *after)]
    _label(axes, line, labels + [(*point, "left") for point in before])
    return figure


def _mark(axes: Axes, events: Sequence[tuple[int, str]]) -> None:
    """Draws a line at each event and its name above the axes, in the lowest free row."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    left = list[Any]()
    right = list[Any]()
    for step, what in sorted(events):
        text = axes.text(step, 1, f" {shorten(what, 60)} ", color=RED, fontsize=8, parse_math=False)
        (right if text.get_window_extent().x1 > figure.bbox.x1 else left).append((step, text))
    used_rows: list[tuple[int, float, float]] = []
    # from the inside out, so that no line crosses a name
    for step, text in [*reversed(left), *right]:
        text.set(transform=axes.get_xaxis_transform(), ha="right" if (step, text) in right else "left")
        extent = text.get_window_extent()
        rows = {row for row, x0, x1 in used_rows if x0 <= extent.x1 and extent.x0 <= x1}
        row = next(row for row in range(len(used_rows) + 1) if row not in rows)
        used_rows.append((row, extent.x0, extent.x1))
        text.set_y(1.02 + 0.055 * row)
        style: dict[str, Any] = {"color": RED, "linestyle": ":", "linewidth": 0.9, "zorder": 1, "clip_on": False}
        axes.plot([step, step], [0, 1.045 + 0.055 * row], transform=axes.get_xaxis_transform(), **style)


def _label(axes: Axes, curve: Any, points: Sequence[tuple[int, float, str]]) -> None:  # noqa: ANN401 - a line or a text
    """Writes values next to their points, at the side with the fewest collisions."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    lines.append(curve.get_path().transformed(axes.transData))  # counts twice, because axes.lines has it, too
    used = list[Any]()
    seen = set()
    dots = {(step, value): axes.transData.transform((step, value)) for step, value, _ in points if abs(value) < 1e100}
    for step, value, side in points:
        if (step, value) in seen or not abs(value) < 1e100:
            continue
        seen.add((step, value))
        short = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:,.3g}"
        text = axes.annotate(short, (step, value), (6, 3), textcoords="offset points", fontsize=8)
        sides = ["right", "left"] if side == "right" else ["left", "right"]
        options = list[tuple[int, int, tuple[str, bool], Any]]()
        for up, name in itertools.product((True, False), sides):
            _put(text, name, up)
            extent = text.get_window_extent()
            if not any(extent.padded(3).overlaps(other) for other in used):
                cost = sum(line.intersects_bbox(extent.padded(2), filled=False) for line in lines)
                if extent.x0 < axes.bbox.x0 or extent.x1 > axes.bbox.x1 or extent.y0 < axes.bbox.y0:
                    cost += 2  # it leaves the axes
                center = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
                if min(dots, key=lambda dot: math.dist(dots[dot], center)) != (step, value):
                    cost += 2  # another dot is nearer
                options.append((cost, len(options), (name, up), extent))
        if not options:
            text.remove()
            continue
        _, _, side_and_height, extent = min(options)
        _put(text, *side_and_height)
        used.append(extent)


def _put(text: Any, side: str, up: bool) -> None:  # noqa: ANN401 - a line or a text
    text.set(ha="left" if side == "right" else "right", va="bottom" if up else "top")
    text.xyann = (6 if side == "right" else -6, 3 if up else -3)
