"""Turns multi-head attention into grouped-query and multi-query attention."""
