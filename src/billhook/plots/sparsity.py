"""A picture of how many weights of each linear are zero."""

import math
import re

import numpy as np
from matplotlib.axes import Axes
from torch import nn

from billhook.arguments import check_types
from billhook.model.layers import prunable, weight_of
from billhook.plots.style import Plot, heat_map
from billhook.sparsity.weight_plan import WeightPlan
from billhook.tracing.show import name_pattern

NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")
"""The number of a block in the name of a linear."""


def sparsity(of: WeightPlan | nn.Module) -> Plot:
    """Draws the share of zeros of each linear: a row for linears of one name, a column for each block.

    Linears that stand in no block have a column of their own at the right; of several in one block, as of experts, the mean is
    drawn.

    Args:
        of: A plan, as `bh.prune` returns it, or a model as it now is.

    Raises:
        ValueError: If it is neither, or has no linear.

    >>> import billhook as bh
    >>> from billhook import plots
    >>> plan = bh.prune(bh.load("tiny"), bh.Magnitude(), sparsity=0.5, dry_run=True)
    >>> plots.sparsity(plan).axes[0].get_title()
    '50.0% of 2,228,224 weights are zero'
    """
    check_types(sparsity, locals())
    zeros, sizes = _counted(of)
    if not sizes:
        raise ValueError("of: there is no linear in it")
    cells = {name: (name_pattern(f"{name}.").removesuffix("."), _block_of(name)) for name in sizes}
    kinds = list(dict.fromkeys(kind for kind, _ in cells.values()))
    blocks = sorted({block for _, block in cells.values()})
    sums = np.zeros((2, len(kinds), len(blocks)))
    for name, (kind, block) in cells.items():
        sums[:, kinds.index(kind), blocks.index(block)] += zeros[name], sizes[name]
    table = np.full(sums.shape[1:], np.nan)
    np.divide(sums[0], sums[1], out=table, where=sums[1] > 0)
    size = min(3.2 + 0.42 * len(blocks), 14), min(max(2.6, 0.3 * len(kinds) + 1.4), 14)
    figure = Plot(figsize=size, dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    heat_map(axes, table, kinds, "share of zeros", 0, 1)
    every = max(1, len(blocks) // 16)
    labels = ["none" if block == math.inf else str(block) for block in blocks]
    axes.set_xticks(range(0, len(blocks), every), labels[::every])
    total = sum(sizes.values())
    axes.set(xlabel="block", title=f"{sum(zeros.values()) / total:.1%} of {total:,} weights are zero")
    if table.size <= 200:
        for (row, column), share in np.ndenumerate(table):
            if not math.isnan(share):
                colour = "white" if share > 0.6 else "black"
                axes.text(column, row, f"{100 * share:.0f}%", ha="center", va="center", fontsize=6, color=colour)
    return figure


def _block_of(name: str) -> float:
    """Returns the number of the block that a linear stands in; infinity for none, so that it is drawn last."""
    number = NUMBER.search(f"{name}.")
    return int(number[0]) if number else math.inf


def _counted(of: WeightPlan | nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Counts zeros and weights by linear."""
    if isinstance(of, WeightPlan):
        sizes = {name: math.prod(of.shapes[name]) for name in of.pruned}
        return {name: sizes[name] - mask.kept for name, mask in of.pruned.items()}, sizes
    weights = {name: weight_of(linear) for name, linear in prunable(of).items()}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    return zeros, {name: weight.numel() for name, weight in weights.items()}
