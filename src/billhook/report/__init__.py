"""Measures size, speed, and degradation of models."""
