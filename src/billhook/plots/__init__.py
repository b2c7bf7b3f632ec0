"""Plots as matplotlib figures for notebooks and `savefig`; pyplot is not used."""

from billhook.plots.heads import heads
from billhook.plots.pareto import pareto
from billhook.plots.speed import speed
from billhook.plots.validation import validation

__all__ = ["heads", "pareto", "speed", "validation"]
