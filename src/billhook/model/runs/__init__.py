"""Runs a model on small inputs: what it reads, what it answers, and the numbers that it computes with."""
