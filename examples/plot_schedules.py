"""Draw the schedules: `python examples/plot_schedules.py docs/schedules.png`."""

import sys

import billhook as bh
from billhook import plots

SCHEDULES = {
    "Constant(0.7, start=0.2)": bh.schedules.Constant(0.7, start=0.2),
    "Linear(0.7, start=0.1, end=0.8)": bh.schedules.Linear(0.7, start=0.1, end=0.8),
    "Cubic(0.7, start=0.1, end=0.8)": bh.schedules.Cubic(0.7, start=0.1, end=0.8),
    "Cubic(0.7, ..., every=100)": bh.schedules.Cubic(0.7, start=0.1, end=0.8, every=100),
    "Cosine(0.7, start=0.1, end=0.8)": bh.schedules.Cosine(0.7, start=0.1, end=0.8),
    "Exponential(0.7, start=0.1, end=0.8)": bh.schedules.Exponential(0.7, start=0.1, end=0.8),
    "MultiStep([0.3, 0.5, 0.7], [0.1, 0.4, 0.7])": bh.schedules.MultiStep([0.3, 0.5, 0.7], [0.1, 0.4, 0.7]),
}

if __name__ == "__main__":
    plots.schedules(SCHEDULES).savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/schedules.png")
