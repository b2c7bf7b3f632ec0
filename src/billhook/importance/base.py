"""How much each unit of a model matters: one score for each head, channel, expert or block."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.units.units import Per, Units


@dataclass(eq=False)
class Sums:
    """Sums over batches, whose ratio is the importance; those of several ranks, or of other batches, add up.

    Attributes:
        totals: By place, float64, `[units]`.
        counts: By place, the number of tokens, examples or batches that were summed for each unit: float64, `[units]`.
    """

    totals: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def zero(cls, units: Mapping[str, Units], per: Per) -> "Sums":
        """Returns sums over nothing."""
        empty = ({name: torch.zeros(one.count(per), dtype=torch.float64) for name, one in units.items()} for _ in range(2))
        return cls(*empty)

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds the sums of one batch for one place."""
        self.totals[name] += total.detach().cpu().double()
        self.counts[name] += count

    def merge(self, other: "Sums") -> None:
        """Adds the sums over other batches, of the same places."""
        for name, total in other.totals.items():
            self.add(name, total, other.counts[name])


@dataclass(frozen=True)
class Importance(ABC):
    """How much a unit matters; the higher, the longer it stays. A subclass is one file, also one of your own by `class_path`.

    Attributes:
        needs_data: Whether it needs batches.
        needs_gradients: Whether it needs gradients, which a streamed model has not.
        in_turn: Whether it has the block of a module brought (`billhook.engine.store.bring`) before it looks into its weights
            other than in a forward, so that one block at a time of a model that ranks share need be whole.
    """

    needs_data: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    in_turn: ClassVar[bool] = False

    @property
    def adds_up(self) -> bool:
        """Tells whether `Sums.merge` of the sums over some batches and over others gives those over all of them."""
        return True

    @abstractmethod
    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches.

        Args:
            model: The model, in eval mode.
            units: Its units, by place.
            per: For heads, whether there is a score for each query head or each KV head.
            runs: The batches; of a model that is streamed, `Together` runs them side by side.

        Raises:
            ValueError: If it cannot score such units, a batch gives no score, or the loss does not depend on a place.
        """

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place from the ratio of its sums: float64, `[units]`."""
        return mean
