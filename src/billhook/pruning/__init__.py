"""Chooses and removes units and blocks: amount, plan, surgery."""
