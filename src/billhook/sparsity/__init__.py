"""Weights become zero, shapes stay: scores, masks, and how much each layer gives."""
