"""Refit: another criterion's mask, and the least-squares weights on it, by conjugate gradients.

"ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng, Behdin, Wang & Mazumder, 2024,
https://arxiv.org/abs/2406.07831), algorithm 2.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from billhook.arguments import annotated, number, whole
from billhook.engine.statistics import InputMoments, Statistics
from billhook.linalg import conjugate_gradients, damp_
from billhook.sparsity.criteria import Comparison, Criterion, Wanda


@dataclass(frozen=True)
class Refit(Criterion):
    """Another criterion's mask, and the kept weights that give the layer's outputs best: min ||W X - V X||^2 on the mask.

    SparseGPT settles each weight once, from left to right; here all kept weights of a row are solved for together, as in ALPS
    (Meng et al., 2024, https://arxiv.org/abs/2406.07831), algorithm 2.

    Args:
        criterion: The one that chooses the mask, `Wanda()` by default.
        steps: Steps of conjugate gradients.
        damping: Ridge towards the old weights, as a share of the mean squared input.

    Raises:
        ValueError: If there is not at least one step, the damping is negative, or the criterion compares all layers.

    Example:
        >>> from billhook import Magnitude
        >>> refit = Refit(Magnitude(), damping=0.0)
        >>> moments = refit.statistics(in_features=2)
        >>> moments.add(torch.tensor([[1.0, 0.5], [1.0, 0.5]]))  # the second input is always half of the first
        >>> refit.prune(torch.tensor([[4.0, 2.0]]), moments, sparsity=0.5)[0]
        tensor([[5., 0.]])
    """

    criterion: Criterion = field(default_factory=Wanda)
    steps: int = 10
    damping: float = 0.01
    compares: Comparison = field(default="row", init=False, repr=False)
    needs: ClassVar[type[Statistics] | None] = InputMoments
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        annotated(Refit, vars(self))
        whole("steps", self.steps)
        number("damping", self.damping, least=0)
        if self.criterion.compares == "global":
            raise ValueError("criterion: one that compares all layers cannot be refitted, as that goes layer by layer")
        object.__setattr__(self, "compares", self.criterion.compares)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes the scores of the criterion that chooses the mask."""
        return self.criterion.score(weight, statistics)

    def prune(
        self, weight: Tensor, statistics: Statistics | None = None, sparsity: float | None = None, pattern: str = "unstructured"
    ) -> tuple[Tensor, Tensor]:
        """Prunes by the criterion, and refits the kept weights. See `Criterion.prune`."""
        moments = self._of_inputs(statistics, weight, InputMoments)
        pruned, keep = self.criterion.prune(weight, moments, sparsity, pattern)
        with torch.autocast(weight.device.type, enabled=False):
            h, solution = damp_(moments.products.clone(), self.damping), pruned.float().clone()
            residual = ((weight.detach().float() - solution) @ h).mul_(keep)
            conjugate_gradients(solution, residual, h, keep, self.steps)
        return solution.to(weight.dtype), keep
