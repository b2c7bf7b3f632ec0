"""How much a unit matters by the gradient of a gate on it.

"Are Sixteen Heads Really Better than One?" (Michel, Levy & Neubig, 2019, https://arxiv.org/abs/1905.10650).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from billhook.arguments import one_of
from billhook.engine.batches import Run
from billhook.importance.probes import Products, check_read
from billhook.importance.score import Importance, Sums
from billhook.units.units import Per, Units

Each = Literal["token", "example", "batch"]


@dataclass(frozen=True)
class GateGradient(Importance):
    """I_u = E_x |dL(x) / d gate_u| = E_x |a_u(x)^T dL(x) / d a_u(x)| (Michel et al., section 4.1, equation 2).

    a_u is a unit's output: of a head its context vector, of a channel one number. One backward pass a batch gives it for all
    units. The loss is taken as it is: where it is a mean over a batch, batches should be of one size.

    Args:
        each: The x whose absolute values are averaged: `"token"`, as in the authors' code, `"example"` (a sequence or image), or
            `"batch"`. Signs within one x cancel, so the three rank differently.

    Raises:
        ValueError: If `each` is not one of these. When it runs: if nothing reads the units alone, a gradient is NaN or infinite,
            or the loss does not depend on a place.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.GateGradient(), [model.dummy_inputs])
        >>> [len(of_place) for of_place in scores.values()]
        [8, 8, 8, 8]
    """

    needs_gradients: ClassVar[bool] = True
    in_turn: ClassVar[bool] = True
    each: Each = "token"

    def __post_init__(self) -> None:
        one_of("each", self.each, Each)

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_read(units, type(self).__name__)
        sums = Sums.zero(units, per)
        for number, run in enumerate(runs):
            Products(units, per, run.tokens, partial(self._note, sums, number)).run(model, run.forward)
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
