"""Attaches, masks and merges LoRA adapters."""
