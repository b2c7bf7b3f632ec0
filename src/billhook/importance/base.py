"""How much each unit matters: scores of heads, channels or experts, of any model that `trace` knows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from billhook.running.batches import Run
from billhook.units.units import Per, Units


@dataclass(eq=False)
class Sums:
    """Sums over batches, of which the ratio is the importance; those of several ranks add up.

    Attributes:
        totals: By place, float64, `[units]`.
        counts: By place, of how many tokens, examples or batches: float64, no dimensions.
    """

    totals: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def zero(cls, units: Mapping[str, Units], per: Per) -> "Sums":
        """Nothing yet."""
        totals = {name: torch.zeros(one.count(per), dtype=torch.float64) for name, one in units.items()}
        return cls(totals, {name: torch.zeros((), dtype=torch.float64) for name in units})

    def add(self, name: str, total: Tensor, count: float) -> None:
        """Adds what one batch gives for one place."""
        self.totals[name] += total.detach().double().cpu()
        self.counts[name] += count


@dataclass(frozen=True)
class Importance(ABC):
    """How much a unit matters; the higher, the longer it stays."""

    needs_data: ClassVar[bool] = True

    @abstractmethod
    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Run]) -> Sums:
        """The sums over batches.

        Args:
            model: The model, in eval mode.
            units: Its units, by place.
            per: Whether heads are query heads or KV heads; of other units it says nothing.
            trials: The batches.

        Raises:
            ValueError: If it cannot tell of such units, a batch gives none, or the loss does not depend on a place.
        """

    def of_mean(self, mean: Tensor) -> Tensor:
        """The scores of a place, of the ratio of its sums: float64, `[units]`."""
        return mean
