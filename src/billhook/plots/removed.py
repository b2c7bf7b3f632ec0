"""Plot of the units that a plan removes from each layer."""

from matplotlib.axes import Axes

from billhook.arguments import check_types
from billhook.kv_heads.plan import KVHeadPlan
from billhook.plots.style import BLUE, RED, Plot, distinct_parts, style_axes
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.units.units import PLURAL

Bars = dict[str, tuple[float, float]]
"""Layer -> value before and after."""


def removed(plan: UnitPlan | BlockPlan | KVHeadPlan) -> Plot:
    """Plots the units that a plan keeps and removes: a panel per kind, a bar per layer.

    Bars of blocks have the height of their scores, if the plan has scores.

    Args:
        plan: A plan of units, blocks, or KV heads, before or after it is applied.

    Raises:
        ValueError: If it is any other plan.

    >>> import billhook as bh
    >>> from billhook import plots
    >>> model = bh.load("tiny")
    >>> plots.removed(bh.pruning.plan_units(model, {0: [1, 5], 2: [3]})).axes[0].get_title()
    '3 heads in 2 attention modules'
    """
    check_types(removed, locals())
    panels: dict[str, Bars] = {}
    if isinstance(plan, BlockPlan):
        for stack, (count,) in plan.before.items():
            removed_blocks, scores = plan.units.get(stack, []), plan.scores.get(stack)
            heights = scores or [1.0] * count
            label = f"{stack}: {'score' if scores else 'blocks'}"
            panels[label] = {
                str(block): (heights[block], heights[block] * (block not in removed_blocks)) for block in range(count)
            }
    elif isinstance(plan, UnitPlan):
        grouped = any(before[0] != before[-1] for before in plan.before.values())
        for name, kind in plan.kinds.items():
            before, after = plan.before[name], plan.after[name]
            panels.setdefault(PLURAL[kind], {})[name or "the model"] = before[0], after[0]
            if kind == "head" and grouped:  # several query heads share a KV head
                panels.setdefault("KV heads", {})[name] = before[-1], after[-1]
    else:
        panels["KV heads"] = dict.fromkeys(plan.layers, (plan.before, plan.after))
    width = min(max(5, 0.28 * max(map(len, panels.values())) + 1.5), 14)
    figure = Plot(figsize=(width, 0.4 + 2.3 * len(panels)), dpi=150, layout="constrained")
    for axes, (what, bars) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _draw(axes, what, bars)
    figure.axes[-1].set_xlabel("layer")
    first: Axes = figure.axes[0]
    first.set_title(plan.words or "nothing is removed", fontsize=10)
    first.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, what: str, bars: Bars) -> None:
    positions = range(len(bars))
    axes.bar(positions, [before for before, _ in bars.values()], color=RED, alpha=0.35, label="removed")
    axes.bar(positions, [after for _, after in bars.values()], color=BLUE, label="left")
    names, every = distinct_parts(list(bars)), max(1, len(bars) // 32)
    axes.set_xticks(positions[::every], names[::every], rotation=90 if max(map(len, names)) > 3 else 0, fontsize=7)
    axes.set_ylabel(what)
    style_axes(axes)
