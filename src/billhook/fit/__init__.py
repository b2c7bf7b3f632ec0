"""Gives every callback what it needs of a Lightning fit: when, on which data, on all ranks, in checkpoints."""
