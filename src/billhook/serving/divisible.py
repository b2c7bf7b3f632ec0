"""Says which numbers engines can divide: rows into blocks of quantised weights, KV heads among GPUs."""

MULTIPLES = (256, 128, 64, 32)
"""What the length of a row is best a multiple of, the best first.

K-quants of llama.cpp take blocks of 256, FP8 and other formats 128 or 64, and all that llama.cpp has 32.
"""
GPUS = (2, 4, 8)
"""How many GPUs may share each layer (tensor parallelism)."""


def multiple_of(length: int) -> int:
    """Returns the largest of `MULTIPLES` that a length is a multiple of; 1 if it is of none.

    >>> multiple_of(1280), multiple_of(1216), multiple_of(1229)
    (256, 64, 1)
    """
    return next((multiple for multiple in MULTIPLES if length % multiple == 0), 1)


def shares(kv_heads: int, gpus: int, exact: bool = False) -> bool:
    """Tells whether a number of GPUs can share KV heads; unless `exact`, each may have a copy of a head with others."""
    return kv_heads % gpus == 0 or (not exact and gpus % kv_heads == 0)
