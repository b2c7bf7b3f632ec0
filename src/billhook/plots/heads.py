"""Plot of the importance of each head."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.lines import Line2D
from torch import Tensor

from billhook.arguments import check_types
from billhook.plots.style import BLUE, RED, Plot, metric_label, style_axes


def heads(
    importance: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]] | None = None,
    curve: Sequence[tuple[float, float]] = (),
    name: str = "",
    masked: bool = False,
) -> Plot:
    """Plots a heat map of head importance, and optionally a metric over the fraction removed.

    Removed heads are crossed out. Two points with the same fraction are the metric before and after training, for example between
    rounds.

    Args:
        importance: Scores `[heads]` by attention module, as `bh.score` returns them; NaN for heads removed before.
        removed: Heads to remove by attention module, such as `plan.units`. Other modules are ignored.
        curve: Pairs of the fraction of heads removed (0..1) and the metric.
        name: Name of the metric.
        masked: If True, labels the heads as masked instead of removed.

    Raises:
        ValueError: If an argument is not legal, or `importance` is empty.

    >>> import torch
    >>> from billhook import plots
    >>> figure = plots.heads({"layers.0.attn": torch.rand(8), "layers.1.attn": torch.rand(8)}, {"layers.1.attn": [2, 5]})
    >>> figure.axes[0].get_title()
    '2 of 16 heads removed'
    """
    check_types(heads, locals())
    if not importance:
        raise ValueError("importance={} must have the scores of at least one attention module")
    table = np.full((len(importance), max(map(len, importance.values()))), np.nan)
    for row, scores in enumerate(importance.values()):
        table[row, : len(scores)] = scores.detach().float().cpu().numpy()
    height = min(max(3.2, 0.28 * len(table) + 1.2), 14)
    figure = Plot(figsize=(9.5 if curve else 5, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    image = axes[0].imshow(table, aspect="auto", cmap="Blues", vmin=np.nanmin(table, initial=0))  # NaN stays blank
    figure.colorbar(image, ax=axes[0], label="importance", shrink=0.8)
    axes[0].set_yticks(range(len(table)), distinct_parts(list(importance)), fontsize=max(4, min(8, 200 // len(table))))
    crossed = [(head, row) for row, layer in enumerate(importance) for head in (removed or {}).get(layer, ())]
    if crossed:
        axes[0].plot(*zip(*crossed, strict=True), "x", color=RED, markersize=4, markeredgewidth=1.2)
    number = sum(map(len, importance.values()))
    action = "masked" if masked else "removed"
    axes[0].set(xlabel=f"head (x: {action})", ylabel="layer", title=f"{len(crossed)} of {number} heads {action}")
    axes[0].locator_params(axis="x", integer=True)
    if curve:
        points = [(100 * share, value) for share, value in curve]
        axes[1].plot(*zip(*points, strict=True), "o", markersize=4, color=BLUE)
        finite = [pair for pair in pairwise(points) if math.isfinite(pair[0][1]) and math.isfinite(pair[1][1])]
        colors = [BLUE if start[0] == end[0] else RED for start, end in finite]
        if BLUE in colors or len(finite) == 1:  # arrows for pruning and training steps
            for (start, end), color in zip(finite, colors, strict=True):
                axes[1].annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 3, "shrinkB": 3})
            lines = [Line2D([], [], color=RED, label="pruning"), Line2D([], [], color=BLUE, label="training")]
            axes[1].legend(handles=lines if BLUE in colors else lines[:1], frameon=False, fontsize=8)
        elif finite:
            axes[1].plot(*zip(*points, strict=True), "-", linewidth=1.4, color=BLUE)
        axes[1].set(xlabel=f"heads {action}, %", ylabel=metric_label(name))
        style_axes(axes[1])
    return figure


def distinct_parts(names: Sequence[str]) -> list[str]:
    """Shortens names by removing their common beginning and end.

    >>> distinct_parts(["model.layers.0.mlp", "model.layers.1.mlp"])
    ['0', '1']
    """
    parts_of = [name.split(".") for name in names]
    min_length = min(map(len, parts_of)) - 1
    start = _first_difference(list(zip(*parts_of, strict=False))[:min_length], 0)
    end = _first_difference(list(zip(*map(reversed, parts_of), strict=False))[: min_length - start], min_length - start)
    return [".".join(parts[start : len(parts) - end]) for parts in parts_of]


def _first_difference(columns: Sequence[tuple[str, ...]], default: int) -> int:
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), default)
