"""Numbers of KV heads that engines can divide among devices."""

from billhook.serving.divisible import GPUS, shares


def suits(kv_heads: int) -> bool:
    """Tells whether so many KV heads can be divided among 2, 4 and 8 devices.

    >>> [number for number in range(1, 33) if suits(number)]
    [1, 2, 4, 8, 16, 24, 32]
    """
    return all(shares(kv_heads, gpus) for gpus in GPUS)


def suiting(kept: int, count: int, least: int = 1) -> int:
    """Returns the number of KV heads nearest to one that suits, or all of them; the higher of two.

    >>> suiting(7, 8), suiting(3, 8), suiting(26, 32), suiting(2, 3)
    (8, 4, 24, 2)
    """
    options = [number for number in range(count, least - 1, -1) if number == count or suits(number)]
    return min(options, key=lambda number: abs(number - kept))


def told(kv_heads: int) -> str:
    """Returns the words for a number that does not suit."""
    return f"{kv_heads} KV heads cannot be divided among 2, 4 and 8 devices, as 1, 2, 4 or a multiple of 8 can"
