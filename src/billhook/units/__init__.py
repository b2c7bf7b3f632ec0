"""Finds what can be taken out of a model (heads, channels, experts, blocks), and gates on it."""
