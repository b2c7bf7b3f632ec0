"""A picture of how much each head matters."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from billhook.arguments import annotated
from billhook.plots.heat import heat_map
from billhook.plots.style import BLUE, RED, Picture, dress, words


def heads(
    importance: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]] | None = None,
    curve: Sequence[tuple[float, float]] = (),
    name: str = "",
) -> Picture:
    """Draws a heat map of heads, with removed ones crossed out, and beside it a metric over the share of heads removed.

    Args:
        importance: By attention, the score of each head, `[heads]`, as `bh.score` returns it; NaN for heads that were gone.
        removed: By attention, the heads that go, such as `plan.units`; other places in it are left out.
        curve: Shares of heads removed, in 0..1, each with the metric.
        name: The metric's name.

    Raises:
        ValueError: If an argument is not legal, or there is no attention.

    >>> import torch
    >>> from billhook import plots
    >>> figure = plots.heads({"layers.0.attn": torch.rand(8), "layers.1.attn": torch.rand(8)}, {"layers.1.attn": [2, 5]})
    >>> figure.axes[0].get_title()
    '2 of 16 heads removed'
    """
    annotated(heads, locals())
    if not importance:
        raise ValueError("importance={} must have the scores of one attention at least")
    gone = {layer: list((removed or {}).get(layer, ())) for layer in importance}
    table = np.full((len(importance), max(map(len, importance.values()))), np.nan)
    for row, scores in enumerate(importance.values()):
        table[row, : len(scores)] = scores.detach().float().cpu().numpy()
    tall = min(max(3.2, 0.28 * len(table) + 1.2), 14)
    figure = Picture(figsize=(9.5 if curve else 5, tall), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    heat_map(axes[0], table, list(importance), "importance", least=np.nanmin(table, initial=0))
    for row, own in enumerate(gone.values()):
        if own:
            axes[0].plot(own, [row] * len(own), "x", color=RED, markersize=4, markeredgewidth=1.2)
    number = sum(map(len, importance.values()))
    axes[0].set(xlabel="head (x: removed)", title=f"{sum(map(len, gone.values()))} of {number} heads removed")
    axes[0].locator_params(axis="x", integer=True)
    if curve:
        axes[1].plot(*zip(*[(100 * share, value) for share, value in curve], strict=True), "o-", markersize=3.5, color=BLUE)
        axes[1].set(xlabel="heads removed, %", ylabel=words(name))
        dress(axes[1])
    return figure
