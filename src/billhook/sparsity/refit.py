"""After a mask is chosen: the least-squares weights on what it keeps, by conjugate gradients."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from billhook.sparsity.criteria import Comparison, Criterion, Wanda
from billhook.sparsity.statistics import InputMoments, Statistics


def refit(weight: Tensor, pruned: Tensor, keep: Tensor, products: Tensor, damping: float, steps: int) -> Tensor:
    """Moves what is kept towards the minimum of ||(W - V) X||^2 + damping * mean(diag(X X^T)) ||W - V||^2 over the support of V.

    Every row is a least-squares problem of its own, with one matrix H = X X^T + damping * mean(diag) I and another support. All
    rows take the steps of conjugate gradients together, preconditioned by the diagonal of H, with one product by H a step.

    Args:
        weight: W, before pruning, `[out_features, in_features]`, of any floating dtype.
        pruned: Where to start, zero outside of the support.
        keep: The support, bool.
        products: X X^T, float32, `[in_features, in_features]`.
        damping: Share of the mean of its diagonal that is added to it.
        steps: How many.

    Returns:
        V, float32, zero outside of the support; the error never rises from step to step.
    """
    h = products.clone()
    h.diagonal().add_(damping * products.diagonal().mean())
    scale = h.diagonal().clamp(min=torch.finfo(h.dtype).tiny)
    solution = pruned.float().clone()
    residual = ((weight.float() - solution) @ h).mul_(keep)
    scaled = residual / scale
    direction = scaled.clone()
    before = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        turned = (direction @ h).mul_(keep)
        length = before / _nonzero((direction * turned).sum(1, keepdim=True))
        solution.add_(direction * length)
        residual.sub_(turned.mul_(length))
        scaled = torch.div(residual, scale, out=scaled)
        after = (residual * scaled).sum(1, keepdim=True)
        direction.mul_(after / _nonzero(before)).add_(scaled)
        before = after
    return solution


def _nonzero(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, sums, 1)


@dataclass(frozen=True)
class Refit(Criterion):
    """Another criterion's mask, and then the kept weights that give the layer's outputs best: min ||W X - V X||^2 on the mask.

    SparseGPT settles each weight once, from left to right; here all kept weights of a row are solved for together.

    Args:
        criterion: Who chooses the mask, `Wanda()` by default.
        steps: Steps of conjugate gradients.
        damping: Ridge towards the old weights, as a share of the mean squared input.

    Raises:
        ValueError: If there is not one step at least, the damping is negative, or the criterion compares all layers.
    """

    criterion: Criterion = field(default_factory=Wanda)
    steps: int = 10
    damping: float = 0.01
    compares: Comparison = field(default="row", init=False, repr=False)
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be a whole number of at least 1")
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping} must be at least 0")
        if self.criterion.compares == "global":
            raise ValueError("criterion: one that compares all layers cannot be refitted, as that goes layer by layer")
        object.__setattr__(self, "compares", self.criterion.compares)

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics:
        """Empty second moments of the inputs."""
        return InputMoments(in_features, device)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The scores of the criterion that chooses the mask."""
        return self.criterion.score(weight, statistics)

    def prune(
        self, weight: Tensor, statistics: Statistics | None = None, sparsity: float | None = None, pattern: str = "unstructured"
    ) -> tuple[Tensor, Tensor]:
        """Zeroes what the criterion says, and refits what is kept. See `Criterion.prune`."""
        if not isinstance(statistics, InputMoments):
            given = "none" if statistics is None else type(statistics).__name__
            raise ValueError(f"Refit needs InputMoments of the layer's inputs (calibration data), got {given}")
        statistics.check()
        pruned, keep = self.criterion.prune(weight, statistics, sparsity, pattern)
        with torch.autocast(weight.device.type, enabled=False):
            solution = refit(weight.detach(), pruned, keep, statistics.products, self.damping, self.steps)
        return solution.to(weight.dtype), keep
