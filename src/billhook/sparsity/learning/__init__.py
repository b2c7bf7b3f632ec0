"""Masks that are learned in training: chosen again after each step, while all weights learn."""
