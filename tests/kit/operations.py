"""Which operations are computed, and how often."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations within, by their name without an overload.

    >>> import torch
    >>> with Operations() as operations:
    ...     _ = torch.ones(2, 2) @ torch.ones(2, 2)
    >>> operations.counts[torch.ops.aten.mm]
    1
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket] += 1
        return operation(*args, **(kwargs or {}))
