"""Nested lists, tuples and dictionaries: torch's functions for them, which have a public name in new versions only."""

from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten"]
