"""Finds which dimensions of which parameters are one axis, from one run on meta tensors."""
