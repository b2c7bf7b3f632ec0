"""A picture of a validation figure over the steps of a fit, with events marked."""

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
    """Draws a validation figure over optimizer steps, with the events marked.

    Args:
        history: Pairs of step and value. Values that are not finite, or beyond 1e100, leave a gap.
        events: Step, description, and the value right before and right after.
        name: Name of the figure.
        dense: Value of the model before all events, drawn as a line.

    >>> from billhook import plots
    >>> history = [(0, 38.6), (100, 52.0), (200, 44.1)]
    >>> figure = plots.validation(history, [(20, "8 -> 4 KV heads", 38.7, 95.2)], "val_perplexity", dense=38.6)
    >>> figure.axes[0].get_ylabel()
    'validation perplexity'
    """
    figure = Plot(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    before = [(step, 0, value) for step, _, value, _ in events if value is not None]
    after = [(step, 2, value) for step, _, _, value in events if value is not None]
    measured = {step for step, _, _ in before + after}
    points = sorted([(step, 1, value) for step, value in history if step not in measured] + before + after)
    curve = [(step, value if abs(value) < 1e100 else math.nan) for step, _, value in points]
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
    wanted = [(step, value, "right") for step, _, value in after] + [(step, value, "left") for step, _, value in before]
    _label(axes, line, [*((*point, "right") for point in [*curve[-1:], *curve[:1]]), *wanted])
    return figure


def _mark(axes: Axes, events: Sequence[tuple[int, str]]) -> None:
    """Draws a line at each event, and its name above the axes, as low as the other names leave room."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    left, right = list[Any](), list[Any]()
    for step, what in sorted(events):
        text = axes.text(step, 1, f" {shorten(what, 60)} ", color=RED, fontsize=8, parse_math=False)
        side = right if text.get_window_extent().x1 > figure.bbox.x1 else left
        side.append((step, text))
    taken: list[tuple[int, float, float]] = []
    # from the inside out, so that no line has to cross another's name
    for step, text in [*reversed(left), *right]:
        text.set(transform=axes.get_xaxis_transform(), ha="right" if (step, text) in right else "left")
        extent = text.get_window_extent()
        rows = {row for row, x0, x1 in taken if x0 <= extent.x1 and extent.x0 <= x1}
        row = next(row for row in range(len(taken) + 1) if row not in rows)
        taken.append((row, extent.x0, extent.x1))
        text.set_y(1.02 + 0.055 * row)
        style: dict[str, Any] = {"color": RED, "linestyle": ":", "linewidth": 0.9, "zorder": 1, "clip_on": False}
        axes.plot([step, step], [0, 1.045 + 0.055 * row], transform=axes.get_xaxis_transform(), **style)


def _label(axes: Axes, curve: Any, points: Sequence[tuple[int, float, str]]) -> None:  # noqa: ANN401 - a line or a text
    """Writes values next to their points, where they cross the fewest lines and are nearer to no other point or value."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    lines.append(curve.get_path().transformed(axes.transData))  # counts twice
    taken, seen = list[Any](), set[tuple[int, float]]()
    dots = {(step, value): axes.transData.transform((step, value)) for step, value, _ in points if abs(value) < 1e100}
    for step, value, side in points:
        if (step, value) in seen or not abs(value) < 1e100:
            continue
        seen.add((step, value))
        text = axes.annotate(_short(value), (step, value), (6, 3), textcoords="offset points", fontsize=8)
        sides = ["right", "left"] if side == "right" else ["left", "right"]
        free = list[tuple[int, int, tuple[str, bool], Any]]()
        for where in [(name, up) for up in (True, False) for name in sides]:
            _put(text, *where)
            extent = text.get_window_extent()
            if not any(extent.padded(3).overlaps(other) for other in taken):
                outside = extent.x0 < axes.bbox.x0 or extent.x1 > axes.bbox.x1 or extent.y0 < axes.bbox.y0
                crossed = sum(line.intersects_bbox(extent.padded(2), filled=False) for line in lines)
                center = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
                away = {dot: math.dist(position, center) for dot, position in dots.items()}
                taken_for_another = min(away, key=away.__getitem__) != (step, value)
                free.append((crossed + 2 * outside + 2 * taken_for_another, len(free), where, extent))
        if not free:
            text.remove()
            continue
        _, _, where, extent = min(free)
        _put(text, *where)
        taken.append(extent)


def _put(text: Any, side: str, up: bool) -> None:  # noqa: ANN401 - a line or a text
    text.set(ha="left" if side == "right" else "right", va="bottom" if up else "top")
    text.xyann = (6 if side == "right" else -6, 3 if up else -3)


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:,.3g}"
