"""Widths that what computes them takes, or likes."""
