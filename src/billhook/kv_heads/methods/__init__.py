"""Pools the KV heads of a group, or first makes them equal; one method a file."""
