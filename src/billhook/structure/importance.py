"""How much each unit matters: scores of heads, channels or experts, of any model that `trace` knows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from billhook.structure.parts import parts_of
from billhook.structure.probes import Products, Trial, check_read
from billhook.structure.units import Per, Units

Each = Literal["token", "example", "batch"]


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
    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
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


@dataclass(frozen=True)
class GateGradient(Importance):
    """I_u = E_x |dL(x) / d gate_u| = E_x |a_u(x)^T dL(x) / d a_u(x)| (Michel et al., 1905.10650, section 4.1, equation 2).

    a_u is what a unit gives to those that read it: of a head its context vector, of a channel one number. One backward pass a
    batch gives it for all units. The loss is taken as it is: where it is a mean over a batch, batches should be of one size.

    Args:
        each: Of what the absolute value is taken, and the mean over: `"token"`, as the authors' code does, `"example"` (a
            sequence or image), or `"batch"`. Signs within what is summed first cancel, so they rank differently.

    Raises:
        ValueError: If `each` is not one of these. When it runs: if nothing reads the units alone, a gradient is NaN or infinite,
            or the loss does not depend on a place.
    """

    each: Each = "token"

    def __post_init__(self) -> None:
        if self.each not in get_args(Each):
            raise ValueError(f"each={self.each!r} must be one of {', '.join(get_args(Each))}")

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        check_read(units, type(self).__name__)
        sums = Sums.zero(units, per)
        for number, trial in enumerate(trials):
            Products(units, per, trial.tokens, partial(self._note, sums, number)).run(model, trial.loss)
        return sums

    def _note(self, sums: Sums, number: int, name: str, products: Tensor, tokens: int) -> None:
        flat = products.flatten(1, -2) if products.dim() > 2 else products.unsqueeze(1)
        if self.each == "token":
            total, count = flat.abs().sum((0, 1)), tokens
        elif self.each == "example":
            total, count = flat.sum(1).abs().sum(0), len(flat)
        else:
            total, count = flat.sum((0, 1)).abs(), 1
        if not total.isfinite().all():
            raise ValueError(f"batches: batch {number} (counted from 0) gives {name} a gradient that is NaN or infinite")
        sums.add(name, total, count)


@dataclass(frozen=True)
class WeightNorm(Importance):
    """The norm of a unit's own parameters: the rows that make it and the columns that read it; needs no data.

    LLM-Pruner's baselines L1 and L2 (2305.11627, section 4.1) rank in the same order.

    Args:
        p: 1 (the sum of |w|) or 2 (the root of the sum of w^2).

    Raises:
        ValueError: If `p` is another.
    """

    needs_data: ClassVar[bool] = False
    p: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p={self.p!r} must be 1 or 2")

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums = Sums.zero(units, per)
        for part in parts_of(model, units, per):
            weight = model.get_parameter(part.name).detach().double()
            sums.add(part.place, part.by_unit(part.along(weight.abs() if self.p == 1 else weight.square())), 0)
        return Sums({name: total.pow(1 / self.p) for name, total in sums.totals.items()}, sums.counts)


@dataclass(frozen=True)
class RandomUnits(Importance):
    """Random scores, the baseline: uniform in [0, 1), the same ones for the same seed; needs no data.

    Args:
        seed: Of the random numbers.
    """

    needs_data: ClassVar[bool] = False
    seed: int = 0

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums, generator = Sums.zero(units, per), torch.Generator().manual_seed(self.seed)
        for name, one in units.items():
            sums.add(name, torch.rand(one.count(per), generator=generator), 1)
        return sums
