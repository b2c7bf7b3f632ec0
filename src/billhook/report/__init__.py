"""Measures what a model weighs and how fast it is, as tables."""
