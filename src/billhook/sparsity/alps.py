"""ALPS: chooses the mask and the weights on it together, by ADMM, then refits them by conjugate gradients.

"ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng, Behdin, Wang & Mazumder, 2024,
https://arxiv.org/abs/2406.07831), algorithms 1 and 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from billhook.arguments import check_int, check_number, check_one_of, check_types
from billhook.engine.statistics import InputGram, Statistics
from billhook.linalg import conjugate_gradients, damp_, in_float64
from billhook.sparsity.criteria import Comparison, Criterion, Wanda, check_finite

EVERY = 3
"""Iterations after which the support is compared with what it was, and the penalty raised."""
RAISED = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By how much, for changes of so large a share of the kept weights, or more."""
LOWERED, LEAST = 5.0, 1e-6
"""The penalty is divided by this, and all begins again, while it holds the first support from the start; and how far at most."""
SETTLED = 30, 3e-4
"""After so many iterations changes of less than this share of the kept weights end it, as in the authors' code."""

Keep = Callable[[Tensor], Tensor]
"""Returns the keep-mask of scores."""


def admm(dense: Tensor, h: Tensor, keep_of: Keep, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    """Minimises tr((B - W) H (B - W)^T) over all B with as many zeros as are asked for, by alternating directions.

    With a copy D of B that has the zeros, the multipliers V of B = D and the penalty r: B = (W H - V + r D) (H + r I)^-1,
    D = B + V / r without its smallest weights, V <- V + r (B - D). The penalty grows until the support of D stays.

    Args:
        dense: W, `[out_features, in_features]`, float32.
        h: H, `[in_features, in_features]`, with a diagonal of ones, as inputs are scaled.
        keep_of: Chooses the support, by magnitude.
        penalty: r at the start.
        steps: The most iterations.

    Returns:
        D and its support.
    """
    # found in float64: in float32 small eigenvalues may come out negative, and r would have to make up for that
    values, vectors = (part.float().to(h.device) for part in torch.linalg.eigh(in_float64(h)))
    goal, v, moved = dense @ h, torch.zeros_like(dense), False
    keep = first = keep_of(dense.abs())
    d, before = dense * keep, keep
    for step in range(1, steps + 1):
        b = (torch.add(goal, d, alpha=penalty).sub_(v) @ vectors).div_(values + penalty) @ vectors.t()
        d = torch.add(b, v, alpha=1 / penalty)
        keep = keep_of(d.abs())
        d *= keep
        v.add_(b.sub_(d), alpha=penalty)
        if step % EVERY:
            continue
        changed, before = float((keep != before).sum() / keep.sum().clamp(min=1)), keep
        moved = moved or changed > 0 or penalty < LEAST
        if not moved:
            penalty, d, v = penalty / LOWERED, dense * first, torch.zeros_like(dense)
        elif not changed or (step > SETTLED[0] and changed < SETTLED[1]):
            break
        else:
            penalty *= next(factor for share, factor in RAISED if changed >= share)
    return d, keep


def refit_(solution: Tensor, difference: Tensor, h: Tensor, keep: Tensor, steps: int) -> None:
    """Moves V, zero off its support, in place towards the minimum of tr((W - V) H (W - V)^T) on it (algorithm 2); given W - V."""
    residual = (difference @ h).mul_(keep)
    del difference  # as large as the weight in float32
    conjugate_gradients(solution, residual, h, keep, steps)


@dataclass(frozen=True)
class ALPS(Criterion):
    """The mask and the weights on it that give the layer's outputs best, found together: min ||W X - V X||^2, V with zeros.

    ADMM moves the mask, beginning with that of Wanda's scores, until it stays; then the kept weights are solved for on it, as
    `Refit` does. Meng et al., 2024, https://arxiv.org/abs/2406.07831. It takes an eigendecomposition of X X^T and two products
    by a matrix of that size for each iteration, a few dozen of them as a rule.

    Args:
        compares: Which weights compete: "layer", as in the paper, or "row".
        damping: Ridge towards the old weights, as a share of the mean squared input.
        penalty: How strongly weights are drawn to their mask in the beginning; inputs are scaled to a mean square of one.
        steps: The most iterations until the mask stays.
        refits: Steps of conjugate gradients on the mask.

    Raises:
        ValueError: If a number is out of range, or all layers shall compete.

    Example:
        >>> alps = ALPS(damping=1e-6)
        >>> moments = alps.statistics(in_features=2)
        >>> moments.add(torch.tensor([[1.0, 0.5], [1.0, 0.5]]))  # the second input is always half of the first
        >>> alps.prune(torch.tensor([[4.0, 2.0]]), moments, sparsity=0.5)[0].round()
        tensor([[5., 0.]])
    """

    compares: Comparison = "layer"
    damping: float = 0.01
    penalty: float = 0.1
    steps: int = 300
    refits: int = 10
    needs: ClassVar[type[Statistics] | None] = InputGram
    updates: ClassVar[bool] = True
    copies: ClassVar[int] = 10  # of float32; eigenvectors are found in float64

    def __post_init__(self) -> None:
        check_types(ALPS, vars(self))
        check_one_of("compares", self.compares, ("row", "layer"))
        check_number("damping", self.damping, above=0)
        check_number("penalty", self.penalty, above=0)
        check_int("steps", self.steps)
        check_int("refits", self.refits, 0)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij| ||X_j||, the ridge in the norm: where ADMM begins."""
        moments = self._of_inputs(statistics, weight, InputGram)
        return (weight.detach().float().abs() * self._scaled(moments)[1]).masked_fill(moments.squares == 0, 0)

    def solve(
        self, weight: Tensor, statistics: Statistics | None, sparsity: float, kept: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Finds the mask, and the weights on it. See `Criterion.prune`."""
        moments = self._of_inputs(statistics, weight, InputGram)
        h, scale = self._scaled(moments)
        zero = (weight.detach() == 0) | (moments.squares == 0)

        def keep_of(scores: Tensor) -> Tensor:
            return self.keep(scores.masked_fill(zero, -1), sparsity, kept, check=False)  # NaN is refused in the end

        with torch.autocast(weight.device.type, enabled=False):
            dense = weight.detach().float().contiguous() * scale
            solution, keep = admm(dense, h, keep_of, self.penalty, self.steps)
            refit_(solution, dense - solution, h, keep, self.refits)
        updated = solution.div_(scale).to(weight.dtype)
        check_finite(updated, f"the updated weight, as {weight.dtype},")
        return updated, keep

    def _scaled(self, moments: InputGram) -> tuple[Tensor, Tensor]:
        """Returns X X^T with the ridge and a diagonal of ones, and by what inputs were divided for that."""
        h = damp_(moments.products.clone(), self.damping)
        scale = h.diagonal().sqrt()
        return h.div_(scale).div_(scale[:, None]), scale


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
    needs: ClassVar[type[Statistics] | None] = InputGram
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(Refit, vars(self))
        check_int("steps", self.steps)
        check_number("damping", self.damping, least=0)
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
        moments = self._of_inputs(statistics, weight, InputGram)
        pruned, keep = self.criterion.prune(weight, moments, sparsity, pattern)
        with torch.autocast(weight.device.type, enabled=False):
            h, solution = damp_(moments.products.clone(), self.damping), pruned.float().clone()
            refit_(solution, weight.detach().float() - solution, h, keep, self.steps)
        return solution.to(weight.dtype), keep
