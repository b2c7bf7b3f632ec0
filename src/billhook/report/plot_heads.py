"""A picture of the importance of heads, and of a metric over the share of heads that is removed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

REMOVED = "#b03a2e"


def plot_heads(
    importance: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]],
    curve: Sequence[tuple[float, float]] = (),
    name: str = "",
) -> Any:  # noqa: ANN401 - matplotlib has no types
    """Draws a heat map of heads, with removed ones crossed out, and the pruning curve; `savefig` of the figure writes it.

    Scores are by attention, `[heads]`, and NaN for heads that were removed before; the curve is a metric by share removed.
    """
    import numpy as np
    from matplotlib.figure import Figure  # slow to import, and needed once

    width = max(len(scores) for scores in importance.values())
    table = np.full((len(importance), width), np.nan)
    for row, scores in enumerate(importance.values()):
        table[row, : len(scores)] = scores.numpy()
    tall = min(max(3.2, 0.28 * len(table) + 1.2), 14)
    figure = Figure(figsize=(9.5 if curve else 5, tall), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    shown = axes[0].imshow(table, aspect="auto", cmap="Blues", vmin=np.nanmin(table, initial=0))
    figure.colorbar(shown, ax=axes[0], label="importance", shrink=0.8)
    for row, layer in enumerate(importance):
        if own := list(removed.get(layer, ())):
            axes[0].plot(own, [row] * len(own), "x", color=REMOVED, markersize=4, markeredgewidth=1.2)
    axes[0].set(
        xlabel="head (x: removed)",
        title=f"{sum(map(len, removed.values()))} of {sum(map(len, importance.values()))} heads removed",
    )
    axes[0].set_yticks(range(len(table)), _distinct(list(importance)), fontsize=max(4, min(8, 200 // len(table))))
    if curve:
        axes[1].plot(*zip(*[(100 * share, value) for share, value in curve], strict=True), "o-", markersize=3.5, color="#1f5f8b")
        axes[1].set(xlabel="heads removed, %", ylabel=name.replace("val_", "validation ").replace("_", " "))
        axes[1].grid(alpha=0.25)
        axes[1].spines[["top", "right"]].set_visible(False)
    return figure


def _distinct(names: Sequence[str]) -> list[str]:
    """Shortens names by their common beginning and end."""
    split = [name.split(".") for name in names]
    least = min(map(len, split)) - 1
    start = next((i for i in range(least) if len({parts[i] for parts in split}) > 1), 0)
    end = next((i for i in range(least - start) if len({parts[-1 - i] for parts in split}) > 1), least - start)
    return [".".join(parts[start : len(parts) - end]) for parts in split]
