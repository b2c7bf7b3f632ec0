"""The error of what is not installed."""


class Missing(RuntimeError):
    """A package that is not installed, or a program that is not found; its message says how to get it."""
