"""Plot of schedules over the steps of training."""

from collections.abc import Mapping

from billhook.arguments import check_int, check_types
from billhook.plots.style import BLUE, Plot, style_axes
from billhook.schedules import Schedule

COLUMNS = 4


def schedules(named: Mapping[str, Schedule], steps: int = 1000) -> Plot:
    """Plots schedules over the steps of training, in panels with shared axes.

    Args:
        named: Schedules by panel title.
        steps: Number of optimizer steps of training, which resolves fractions.

    Raises:
        ValueError: If there is no schedule, or a schedule has a step past the end of training.

    >>> import billhook as bh
    >>> from billhook import plots
    >>> figure = plots.schedules({"cubic": bh.schedules.Cubic(0.7, start=0.1, end=0.8)}, steps=100)
    >>> float(figure.axes[0].lines[0].get_ydata()[80])
    0.7
    """
    check_types(schedules, locals())
    check_int("steps", steps)
    if not named:
        raise ValueError("named={} must have at least one schedule")
    columns = min(COLUMNS, len(named))
    rows = -(-len(named) // columns)
    size = (5, 3.2) if len(named) == 1 else (2.75 * columns, 2.3 * rows)
    figure = Plot(figsize=size, dpi=110, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, (name, schedule) in zip(panels, named.items(), strict=False):
        bound = schedule.bind(steps)
        panel.plot(range(steps + 1), [bound(step) for step in range(steps + 1)], color=BLUE, linewidth=1.8)
        panel.set_title(name.replace(", [", ",\n["), fontsize=8.5)
        style_axes(panel)
    for panel in panels[len(named) :]:
        panel.remove()
    for panel in panels[: len(named)][-columns:]:  # also above a panel that was removed
        panel.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("value", fontsize=9)
    return figure
