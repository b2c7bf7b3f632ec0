"""The ranks as `sparsity` asks for them, until it takes a `Comm`: None where there is one."""

from collections.abc import Sequence

import torch

from billhook.engine.comm import ALONE, Comm, Reduce

Ranks = Comm


def checked(reduce: Reduce | None, device: torch.device) -> Comm | None:
    """Returns the ranks behind an argument `reduce`; None where there is one."""
    found = Comm.of(reduce, device)
    return None if found is ALONE else found


def own_of(costs: Sequence[float], ranks: Comm) -> list[bool]:
    """Picks this rank's pieces of work."""
    return ranks.own_of(costs)
