"""Where the new weights of a model whose blocks ranks share rest: each rank has its shards of what the first has found."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from billhook.engine.fingerprint import fingerprint
from billhook.engine.lazy import itself
from billhook.engine.sharding import Place, whole
from billhook.engine.shards import Turns
from billhook.model.plan import Weights
from billhook.repairs.in_turn import Parameters, Refitted, Values


@dataclass(frozen=True, eq=False)
class Gathered:
    """Gathers a parameter's values whenever it is called, by all ranks together, or returns them if it is not sharded."""

    held: nn.Parameter

    def __call__(self) -> Tensor:
        """Returns the whole values."""
        return whole(self.held)


@torch.no_grad()
def in_shards(turns: Turns, place: Place, value: Tensor, device: torch.device | None = None) -> Gathered:
    """Shards the first rank's new values of the parameter at a place as that is, and returns what gathers them.

    All ranks call it together. What each has solved for by itself may be rounded otherwise.

    Args:
        turns: What has the blocks come and go.
        place: The module that has the parameter, and its name there.
        value: The values, whole.
        device: Where shards rest; by default where those of the parameter do.
    """
    lies, held = turns.lies(place), nn.Parameter(value, requires_grad=False)
    return Gathered(held if lies is None else replace(lies, device=device or lies.device).shards(held, first=True))


class InShards:
    """Shards what becomes of linears as their parameters are; all ranks read it together.

    Args:
        turns: What has the blocks come and go.
        linears: The linears, by name.
    """

    def __init__(self, turns: Turns, linears: Mapping[str, nn.Module]) -> None:
        self._turns, self._linears = turns, linears

    def known(self, _: nn.Module) -> dict[str, dict[str, Tensor] | None]:
        """Returns nothing: no earlier process has left anything."""
        return {}

    def put(self, _: nn.Module | None, new: Parameters, __: Mapping[str, bool]) -> dict[str, Gathered]:
        """Shards new parameters of linears, and returns what gathers each."""
        reads = dict[str, Gathered]()
        for linear, own in new.items():
            for part, value in own.items():
                reads[f"{linear}.{part}"] = in_shards(self._turns, (self._linears[linear], part), value)
        return reads


def told(values: Mapping[str, Tensor]) -> str:
    """Returns a hash of values of parameters, by the parameter's name."""
    return fingerprint(dict(sorted(values.items())))


def tell_weights(weights: Weights | None) -> str:
    """Returns a hash of new values; of those in files none, as the step that wrote them tells."""
    return weights.told if isinstance(weights, Refitted) else told(weights or {})


def both(weights: Values, others: Values) -> Values:
    """Returns new values, and others, which count where there are both; nothing is read."""
    if not isinstance(weights, Refitted) and not isinstance(others, Refitted):
        return {**weights, **others}
    one, other = (own if isinstance(own, Refitted) else _read_again(own) for own in (weights, others))
    return Refitted({**one.reads, **other.reads}, f"{one.told} {other.told}")


def _read_again(values: Values) -> Refitted:
    return Refitted({name: partial(itself, value) for name, value in values.items()}, told(values))
