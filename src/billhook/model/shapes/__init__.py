"""Reads the shape of a model, checks it, and gives it to a model or a checkpoint."""
