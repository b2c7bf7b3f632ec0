"""Michel et al.: the gradient of a gate on each unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

from billhook.importance.base import Importance, Sums
from billhook.importance.probes import Products, check_read
from billhook.running.batches import Run
from billhook.units.units import Per, Units

Each = Literal["token", "example", "batch"]


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

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Run]) -> Sums:
        """See `Importance.sums`."""
        check_read(units, type(self).__name__)
        sums = Sums.zero(units, per)
        for number, trial in enumerate(trials):
            Products(units, per, trial.tokens, partial(self._note, sums, number)).run(model, trial.forward)
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
