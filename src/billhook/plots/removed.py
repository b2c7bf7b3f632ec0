"""A picture of what a plan removes from each layer."""

from matplotlib.axes import Axes

from billhook.arguments import annotated
from billhook.kv_heads.plan import KVHeadPlan
from billhook.plots.style import BLUE, RED, Picture, distinct, dress
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.units.units import PLURAL

Bars = dict[str, tuple[float, float]]
"""By place, how much there is before, and afterwards."""


def removed(plan: UnitPlan | BlockPlan | KVHeadPlan) -> Picture:
    """Draws what a plan leaves of each layer, and what it removes: a panel for each kind of unit, a bar for each layer.

    Blocks are as tall as their scores, where the plan has scores. Of attentions with different numbers of KV heads, a conversion
    shows the most that one has.

    Args:
        plan: A plan of units, of blocks or of KV heads, before or after it is applied.

    Raises:
        ValueError: If it is no such plan.

    >>> import billhook as bh
    >>> from billhook import plots
    >>> model = bh.load("tiny")
    >>> plots.removed(bh.pruning.plan_units(model, {0: [1, 5], 2: [3]})).axes[0].get_title()
    '3 heads in 2 attention modules'
    """
    annotated(removed, locals())
    panels = _of_blocks(plan) if isinstance(plan, BlockPlan) else _of_units(plan) if isinstance(plan, UnitPlan) else _of_kv(plan)
    wide = min(max(5, 0.28 * max(map(len, panels.values())) + 1.5), 14)
    figure = Picture(figsize=(wide, 0.4 + 2.3 * len(panels)), dpi=150, layout="constrained")
    for axes, (what, bars) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _draw(axes, what, bars)
    figure.axes[-1].set_xlabel("layer")
    first: Axes = figure.axes[0]
    first.set_title(plan.words or "nothing is removed", fontsize=10)
    first.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _of_units(plan: UnitPlan) -> dict[str, Bars]:
    """Returns the bars of each kind of unit; of KV heads too, where several query heads share one."""
    panels: dict[str, Bars] = {}
    grouped = any(before[0] != before[-1] for before in plan.before.values())
    for name, kind in plan.kinds.items():
        before, after = plan.before[name], plan.after[name]
        panels.setdefault(PLURAL[kind], {})[name or "the model"] = before[0], after[0]
        if kind == "head" and grouped:
            panels.setdefault("KV heads", {})[name] = before[-1], after[-1]
    return panels


def _of_blocks(plan: BlockPlan) -> dict[str, Bars]:
    panels: dict[str, Bars] = {}
    for stack, (count,) in plan.before.items():
        gone, scores = plan.units.get(stack, []), plan.scores.get(stack)
        tall = [1.0] * count if scores is None else scores
        label = f"{stack}: {'blocks' if scores is None else 'score'}"
        panels[label] = {str(block): (tall[block], 0 if block in gone else tall[block]) for block in range(count)}
    return panels


def _of_kv(plan: KVHeadPlan) -> dict[str, Bars]:
    return {"KV heads": dict.fromkeys(plan.layers, (plan.before, plan.after))}


def _draw(axes: Axes, what: str, bars: Bars) -> None:
    places = range(len(bars))
    axes.bar(places, [before for before, _ in bars.values()], color=RED, alpha=0.35, label="removed")
    axes.bar(places, [after for _, after in bars.values()], color=BLUE, label="left")
    names, every = distinct(list(bars)), max(1, len(bars) // 32)
    turned = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(places[::every], names[::every], rotation=turned, fontsize=7)
    axes.set_ylabel(what)
    dress(axes)
