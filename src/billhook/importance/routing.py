"""Routing of tokens to experts, and its change when experts are removed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from billhook.engine import Comm
from billhook.linalg import float64_device

SUMS = ("tokens", "counts", "gates", "norms")


@dataclass(eq=False)
class Routing:
    """The tokens of a module's experts, by source and by half of the batches.

    Attributes:
        sources: Names of the sources.
        unit_of: Unit of each expert, int64, `[experts]`.
        tokens: Number of tokens, float64, `[sources, 2, 1]`.
        counts: Tokens of each expert, float64, `[sources, 2, experts]`.
        gates: Sums of their gates, of the same shape.
        norms: Sums of gate times norm of the expert's output, of the same shape.
        chosen: Experts of each token of this rank, int16, `[tokens, k]`, after the number of the source.
    """

    sources: list[str]
    unit_of: Tensor
    tokens: Tensor
    counts: Tensor
    gates: Tensor
    norms: Tensor
    chosen: list[tuple[int, Tensor]] = field(default_factory=list)

    @classmethod
    def zero(cls, sources: Sequence[str], unit_of: Tensor, device: torch.device) -> "Routing":
        """Returns the routing of no tokens."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=float64_device(device))
        counts, gates, norms = (zeros(len(sources), 2, len(unit_of)) for _ in range(3))
        return cls(list(sources), unit_of, zeros(len(sources), 2, 1), counts, gates, norms)

    def over_ranks(self, comm: Comm) -> "Routing":
        """Returns the sums over all ranks, which may have different sources."""
        sources = sorted(set().union(*comm.gather(set(self.sources))))
        total, places = Routing.zero(sources, self.unit_of, self.tokens.device), list(map(sources.index, self.sources))
        for name in SUMS:
            getattr(total, name)[places] = getattr(self, name)
        comm.sum_(*(getattr(total, name) for name in SUMS))
        total.chosen = [(places[number], experts) for number, experts in self.chosen]
        return total

    def by_unit(self, values: Tensor) -> Tensor:
        """Sums values of experts by unit: float64, `[units]`, on the CPU."""
        return torch.zeros(int(self.unit_of.max()) + 1, dtype=torch.float64).index_add_(0, self.unit_of, values.cpu())


@dataclass(frozen=True)
class RoutingChange:
    """Change of the routing when experts are removed, for a source of data.

    Attributes:
        source: Name of the source.
        gate_mass: Share of all gates that the kept experts have.
        orphans: Share of tokens whose experts are all removed, over all modules.
        unreached: Number of experts, in all modules, that receive no token.
        agreement: Share of the kept experts that both halves of the data keep. None with one batch.
    """

    source: str
    gate_mass: float
    orphans: float
    unreached: int
    agreement: float | None
