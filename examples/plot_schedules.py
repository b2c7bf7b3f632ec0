"""Draw the schedules: `python examples/plot_schedules.py docs/schedules.png`."""

import sys

from matplotlib.figure import Figure

import billhook as bh

SCHEDULES = {
    "Constant(0.7, start=0.2)": bh.schedules.Constant(0.7, start=0.2),
    "Linear(0.7, start=0.1, end=0.8)": bh.schedules.Linear(0.7, start=0.1, end=0.8),
    "Cubic(0.7, start=0.1, end=0.8)": bh.schedules.Cubic(0.7, start=0.1, end=0.8),
    "Cubic(0.7, ..., every=100)": bh.schedules.Cubic(0.7, start=0.1, end=0.8, every=100),
    "Cosine(0.7, start=0.1, end=0.8)": bh.schedules.Cosine(0.7, start=0.1, end=0.8),
    "Exponential(0.7, start=0.1, end=0.8)": bh.schedules.Exponential(0.7, start=0.1, end=0.8),
    "MultiStep([0.3, 0.5, 0.7], [0.1, 0.4, 0.7])": bh.schedules.MultiStep([0.3, 0.5, 0.7], [0.1, 0.4, 0.7]),
}
STEPS = 1000


def main(path: str) -> None:
    """One panel per schedule, on the same axes."""
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    panels = list(figure.subplots(2, 4, sharex=True, sharey=True).flat)
    for panel, (name, schedule) in zip(panels, SCHEDULES.items(), strict=False):
        bound = schedule.bind(STEPS)
        panel.plot(range(STEPS + 1), [bound(step) for step in range(STEPS + 1)], color="#1f5f8b", linewidth=1.8)
        panel.set_title(name.replace(", [", ",\n["), fontsize=8.5)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(SCHEDULES) :]:
        panel.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("value", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/schedules.png")
