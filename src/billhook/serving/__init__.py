"""Proves that engines run what billhook makes: converted, run in the engine itself, and compared with transformers."""
