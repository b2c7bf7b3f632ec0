"""Chooses and removes units and blocks: amount, plan, surgery."""

from billhook.pruning.planning import plan_units, prune_units

__all__ = ["plan_units", "prune_units"]
