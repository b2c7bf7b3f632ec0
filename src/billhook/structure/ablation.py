"""How much higher the loss is without a unit: the measure that the others stand for, and the dearest."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.structure.gates import place_gates
from billhook.structure.importance import Importance, Sums
from billhook.structure.probes import Trial, check_read
from billhook.structure.units import Per, Units


@dataclass(frozen=True)
class Ablation(Importance):
    """How much higher the loss is without the unit, all others being there (1905.10650, section 3.2): one forward a unit.

    Raises:
        ValueError: When it runs: if nothing reads the units alone.
    """

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        check_read(units, type(self).__name__)
        sums = Sums.zero(units, per)
        with ablating(model, units, per) as gates, torch.no_grad():
            for trial in trials:
                whole = float(trial.loss())
                for name, gate in gates.items():
                    losses = [_without(trial, gate, unit) for unit in range(len(gate))]
                    sums.add(name, torch.tensor(losses, dtype=torch.float64) - whole, 1)
        return sums


@contextmanager
def ablating(model: nn.Module, units: Mapping[str, Units], per: Per) -> Iterator[dict[str, Tensor]]:
    """Gates that are to be set by hand, all 1."""
    gates = {name: torch.ones(one.count(per)) for name, one in units.items()}
    handles = place_gates(model, units, gates, per)
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _without(trial: Trial, gate: Tensor, unit: int) -> float:
    gate[unit] = 0
    try:
        return float(trial.loss())
    finally:
        gate[unit] = 1
