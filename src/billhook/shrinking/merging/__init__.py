"""Lets KV heads merge instead of going, wherever that loses less, for a budget of their cache."""
