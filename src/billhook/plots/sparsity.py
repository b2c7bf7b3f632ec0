"""Plot of the sparsity of each linear layer."""

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
"""The block number in the name of a layer."""


def sparsity(of: WeightPlan | nn.Module) -> Plot:
    """Plots the sparsity of each linear layer: a row per layer name, a column per block.

    Layers outside of blocks have a column on the right. Several layers of one cell, such as experts, are averaged.

    Args:
        of: A plan, as `bh.prune` returns it, or a model.

    Raises:
        ValueError: If it is neither, or has no linear layer.

    >>> import billhook as bh
    >>> from billhook import plots
    >>> plan = bh.prune(bh.load("tiny"), bh.Magnitude(), sparsity=0.5, dry_run=True)
    >>> plots.sparsity(plan).axes[0].get_title()
    '50.0% of 2,228,224 weights are zero'
    """
    check_types(sparsity, locals())
    zeros, sizes = _count_zeros(of)
    if not sizes:
        raise ValueError("of: it has no linear layers")
    cells = {name: (name_pattern(f"{name}.").removesuffix("."), _block_of(name)) for name in sizes}
    kinds, blocks = list[str](), list[float]()
    for kind, block in cells.values():
        if kind not in kinds:
            kinds.append(kind)
        if block not in blocks:
            blocks.append(block)
    blocks.sort()
    sums = np.zeros((2, len(kinds), len(blocks)))
    for name, (kind, block) in cells.items():
        sums[:, kinds.index(kind), blocks.index(block)] += zeros[name], sizes[name]
    table = np.full(sums.shape[1:], np.nan)
    np.divide(sums[0], sums[1], out=table, where=sums[1] > 0)
    size = min(3.2 + 0.42 * len(blocks), 14), min(max(2.6, 0.3 * len(kinds) + 1.4), 14)
    figure = Plot(figsize=size, dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    heat_map(axes, table, kinds, "sparsity", 0, 1)
    every = max(1, len(blocks) // 16)
    labels = ["none" if block == math.inf else str(block) for block in blocks]
    axes.set_xticks(range(0, len(blocks), every), labels[::every])
    total = sum(sizes.values())
    axes.set(xlabel="block", title=f"{sum(zeros.values()) / total:.1%} of {total:,} weights are zero")
    if table.size <= 200:
        for (row, column), share in np.ndenumerate(table):
            if not math.isnan(share):
                color = "white" if share > 0.6 else "black"
                axes.text(column, row, f"{100 * share:.0f}%", ha="center", va="center", fontsize=6, color=color)
    return figure


def _block_of(name: str) -> float:
    """Returns the block number of a layer; infinity for no block, so that it is drawn last."""
    number = NUMBER.search(f"{name}.")
    return int(number[0]) if number else math.inf


def _count_zeros(of: WeightPlan | nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Counts zeros and weights by layer."""
    zeros, sizes = dict[str, int](), dict[str, int]()
    if isinstance(of, WeightPlan):
        for name, mask in of.pruned.items():
            sizes[name] = math.prod(of.shapes[name])
            zeros[name] = sizes[name] - mask.kept
    else:
        for name, layer in prunable(of).items():
            weight = weight_of(layer)
            zeros[name], sizes[name] = int((weight == 0).sum()), weight.numel()
    return zeros, sizes
