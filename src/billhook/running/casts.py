"""The copies that autocast keeps of parameters, in a lower precision, and finds again by the tensor, whatever its values are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Has autocast cast parameters again within, and once more afterwards, so that no copy of other values is computed with.

    Whatever puts other values into a parameter for a while, or for good, does it within such a block.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
