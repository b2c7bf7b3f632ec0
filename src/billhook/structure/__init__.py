"""Tensors become smaller, or are pooled."""
