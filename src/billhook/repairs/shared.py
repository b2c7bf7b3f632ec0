"""Where the new weights of a model whose blocks ranks share rest: each rank has its shards of them."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from billhook.repairs.in_turn import Parameters, Reads
from billhook.running.sharded.shards import whole
from billhook.running.sharded.turns import Turns


class InShards:
    """Shards what becomes of linears as their parameters are; all ranks read it together.

    Args:
        turns: What has the blocks come and go.
        linears: The linears, by name.
    """

    def __init__(self, turns: Turns, linears: Mapping[str, nn.Module]) -> None:
        self._turns, self._linears, self._told = turns, linears, hashlib.sha256()

    def known(self, _: nn.Module) -> dict[str, dict[str, Tensor] | None]:
        """Returns nothing: no earlier process has left anything."""
        return {}

    @torch.no_grad()
    def put(self, _: nn.Module | None, new: Parameters, __: Mapping[str, bool]) -> Reads:
        """Shards new parameters of linears, and returns what gathers each."""
        reads = dict[str, Callable[[], Tensor]]()
        for linear, own in new.items():
            for part, value in own.items():
                lies = self._turns.lies((self._linears[linear], part))
                held = value if lies is None else lies.shards(nn.Parameter(value, requires_grad=False))
                reads[f"{linear}.{part}"] = partial(whole, held)
                self._told.update(told({f"{linear}.{part}": value}).encode())
        return reads

    @property
    def told(self) -> str:
        """A hash of all that was put, as this rank has found it."""
        return self._told.hexdigest()


def told(values: Mapping[str, Tensor]) -> str:
    """Returns a hash of values of parameters, by the parameter's name."""
    found = hashlib.sha256()
    for name, value in values.items():
        found.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
