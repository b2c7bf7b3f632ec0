"""Baseline importances: weight norm and random scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from billhook.engine import Run, store_of
from billhook.importance.score import Importance, Sums
from billhook.linalg import in_float64
from billhook.units import Per, UnitsByModule, parts_of


@dataclass(frozen=True)
class WeightNorm(Importance):
    """Scores a unit by the norm of its producer rows and consumer columns; needs no data.

    Ranks like the baselines L1 and L2 of "LLM-Pruner" (Ma, Fang & Wang, 2023, https://arxiv.org/abs/2305.11627), section 4.1.

    Args:
        p: 1 (the sum of |w|) or 2 (the root of the sum of w^2).

    Raises:
        ValueError: If `p` is neither.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.importance.WeightNorm())
        >>> [len(values) for values in scores.values()]
        [384, 384, 384, 384]
    """

    needs_data = False
    blockwise = True
    p: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if type(self.p) is not int or self.p not in (1, 2):
            raise ValueError(f"p={self.p!r} must be 1 or 2.")

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        sums = Sums.zero(units, per)
        for part in parts_of(model, units, per):
            store_of(model).load(model.get_submodule(part.name.rpartition(".")[0]))
            weight = in_float64(model.get_parameter(part.name).detach())
            sums.add(part.module, part.by_unit(part.sum_others(weight.abs() if self.p == 1 else weight.square())), 0)
        return Sums({name: total.pow(1 / self.p) for name, total in sums.totals.items()}, sums.counts)


@dataclass(frozen=True)
class RandomUnits(Importance):
    """Scores units with random numbers in [0, 1), fixed by the seed; needs no data.

    Args:
        seed: Random seed.
    """

    needs_data = False
    blockwise = True
    seed: int = 0

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        sums, generator = Sums.zero(units, per), torch.Generator().manual_seed(self.seed)
        for name, module_units in units.items():
            sums.add(name, torch.rand(module_units.count(per), generator=generator), 1)
        return sums
