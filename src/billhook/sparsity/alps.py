"""ALPS: finds mask and weights together by ADMM, then refits by conjugate gradients.

"ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng, Behdin, Wang & Mazumder, 2024,
https://arxiv.org/abs/2406.07831), algorithms 1 and 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.arguments import check_int, check_number, check_one_of, check_types
from billhook.engine import InputGram, Statistics
from billhook.linalg import conjugate_gradients, damp_, in_float64
from billhook.sparsity.criteria import Comparison, Criterion, Wanda, check_finite

EVERY = 3
"""Iterations between updates of the penalty, which depend on the change of the support."""
RAISED = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factors of the penalty, for at least this changed share of the kept weights."""
LOWERED, LEAST = 5.0, 1e-6
"""Divisor of the penalty, with a restart, while the first support never changed; and the lowest penalty."""
SETTLED = 30, 3e-4
"""After this many iterations, a changed share below this ends the search, as in the authors' code."""

Keep = Callable[[Tensor], Tensor]
"""Returns the mask of scores."""


def admm(dense: Tensor, h: Tensor, keep_of: Keep, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    """Minimizes tr((B - W) H (B - W)^T) over sparse B, by ADMM.

    With a sparse copy D of B, the multipliers V of B = D, and the penalty r: B = (W H - V + r D) (H + r I)^-1,
    D = B + V / r without its smallest weights, V <- V + r (B - D). The penalty grows until the support of D stays.

    Args:
        dense: W, `[out_features, in_features]`, float32.
        h: H, `[in_features, in_features]`, scaled to a diagonal of ones.
        keep_of: Function that returns the support for magnitudes.
        penalty: Initial r.
        steps: Maximum number of iterations.

    Returns:
        D and its support.
    """
    # in float64: small eigenvalues may become negative in float32, which r would have to outweigh
    values, vectors = (part.float().to(h.device) for part in torch.linalg.eigh(in_float64(h)))
    target, v, has_changed = dense @ h, torch.zeros_like(dense), False
    keep = first = keep_of(dense.abs())
    d, previous = dense * keep, keep
    for step in range(1, steps + 1):
        b = (torch.add(target, d, alpha=penalty).sub_(v) @ vectors).div_(values + penalty) @ vectors.t()
        d = torch.add(b, v, alpha=1 / penalty)
        keep = keep_of(d.abs())
        d *= keep
        v.add_(b.sub_(d), alpha=penalty)
        if step % EVERY:
            continue
        changed, previous = float((keep != previous).sum() / keep.sum().clamp(min=1)), keep
        has_changed = has_changed or changed > 0 or penalty < LEAST
        if not has_changed:
            penalty, d, v = penalty / LOWERED, dense * first, torch.zeros_like(dense)
        elif not changed or (step > SETTLED[0] and changed < SETTLED[1]):
            break
        else:
            penalty *= next(factor for share, factor in RAISED if changed >= share)
    return d, keep


@dataclass(frozen=True)
class ALPS(Criterion):
    """Optimizes mask and weights together: min ||W X - V X||^2 over sparse V.

    ADMM updates the mask, starting from Wanda's scores, until it is stable. Then the kept weights are solved for, as in `Refit`.
    Needs an eigendecomposition of X X^T and two matrix products for each iteration, usually a few dozen.

    Reference: Meng et al., 2024, https://arxiv.org/abs/2406.07831.

    Args:
        compares: Comparison group: `"layer"`, as in the paper, or `"row"`.
        damping: Ridge penalty toward the old weights, as a share of the mean squared input.
        penalty: Initial penalty that pulls weights to the mask; inputs are scaled to a mean square of 1.
        steps: Maximum number of iterations until the mask is stable.
        refits: Steps of conjugate gradients on the mask.

    Raises:
        ValueError: If a number is out of range, or `compares` is `"global"`.

    Example:
        >>> alps = ALPS(damping=1e-6)
        >>> gram = alps.statistics(in_features=2)
        >>> gram.add(torch.tensor([[1.0, 0.5], [1.0, 0.5]]))  # the second input is always half of the first
        >>> alps.prune(torch.tensor([[4.0, 2.0]]), gram, sparsity=0.5)[0].round()
        tensor([[5., 0.]])
    """

    compares: Comparison = "layer"
    damping: float = 0.01
    penalty: float = 0.1
    steps: int = 300
    refits: int = 10
    needs = InputGram
    updates = True
    copies = 10  # of float32; eigenvectors are found in float64

    def __post_init__(self) -> None:
        check_types(ALPS, vars(self))
        check_one_of("compares", self.compares, ("row", "layer"))
        check_number("damping", self.damping, above=0)
        check_number("penalty", self.penalty, above=0)
        check_int("steps", self.steps)
        check_int("refits", self.refits, 0)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij| ||X_j|| with the ridge penalty, `[out_features, in_features]`."""
        gram = self._of_inputs(statistics, weight, InputGram)
        return (weight.detach().float().abs() * self._scaled(gram)[1]).masked_fill(gram.squares == 0, 0)

    def solve(
        self, weight: Tensor, statistics: Statistics | None, sparsity: float, kept: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Finds the mask, and the weights on it. See `Criterion.prune`."""
        gram = self._of_inputs(statistics, weight, InputGram)
        h, scale = self._scaled(gram)
        zero = (weight.detach() == 0) | (gram.squares == 0)

        def keep_of(scores: Tensor) -> Tensor:
            return self.keep(scores.masked_fill(zero, -1), sparsity, kept)

        with torch.autocast(weight.device.type, enabled=False):
            dense = weight.detach().float().contiguous() * scale
            solution, keep = admm(dense, h, keep_of, self.penalty, self.steps)
            # algorithm 2: conjugate gradients move V on its support toward the minimum of tr((W - V) H (W - V)^T), in place
            conjugate_gradients(solution, ((dense - solution) @ h).mul_(keep), h, keep, self.refits)
        updated = solution.div_(scale).to(weight.dtype)
        check_finite(updated, f"the updated weight, as {weight.dtype},")
        return updated, keep

    def _scaled(self, gram: InputGram) -> tuple[Tensor, Tensor]:
        """Returns X X^T with the ridge penalty, scaled to a diagonal of ones, and the scale."""
        h = damp_(gram.products.clone(), self.damping)
        scale = h.diagonal().sqrt()
        return h.div_(scale).div_(scale[:, None]), scale


@dataclass(frozen=True)
class Refit(Criterion):
    """Uses another criterion's mask, and refits the kept weights: min ||W X - V X||^2.

    SparseGPT fixes weights from left to right; here all kept weights of a row are solved for together, as in ALPS (Meng et al.,
    2024, https://arxiv.org/abs/2406.07831), algorithm 2.

    Args:
        criterion: Criterion that chooses the mask. Defaults to `Wanda()`.
        steps: Steps of conjugate gradients.
        damping: Ridge penalty toward the old weights, as a share of the mean squared input.

    Raises:
        ValueError: If `steps` is below 1, the damping is negative, or the criterion compares all layers.

    Example:
        >>> from billhook import Magnitude
        >>> refit = Refit(Magnitude(), damping=0.0)
        >>> gram = refit.statistics(in_features=2)
        >>> gram.add(torch.tensor([[1.0, 0.5], [1.0, 0.5]]))  # the second input is always half of the first
        >>> refit.prune(torch.tensor([[4.0, 2.0]]), gram, sparsity=0.5)[0]
        tensor([[5., 0.]])
    """

    criterion: Criterion = field(default_factory=Wanda)
    steps: int = 10
    damping: float = 0.01
    compares: Comparison = field(default="row", init=False, repr=False)
    needs = InputGram
    updates = True

    def __post_init__(self) -> None:
        check_types(Refit, vars(self))
        check_int("steps", self.steps)
        check_number("damping", self.damping, least=0)
        if self.criterion.compares == "global":
            raise ValueError(
                f"criterion={self.criterion} compares all layers, and Refit works on each layer. Use compares='layer' or 'row'."
            )
        object.__setattr__(self, "compares", self.criterion.compares)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes scores by the criterion of the mask, `[out_features, in_features]`."""
        return self.criterion.score(weight, statistics)

    def prune(
        self, weight: Tensor, statistics: Statistics | None = None, sparsity: float | None = None, pattern: str = "unstructured"
    ) -> tuple[Tensor, Tensor]:
        """Prunes with the criterion and refits the kept weights. See `Criterion.prune`."""
        gram = self._of_inputs(statistics, weight, InputGram)
        pruned, keep = self.criterion.prune(weight, gram, sparsity, pattern)
        with torch.autocast(weight.device.type, enabled=False):
            h, solution = damp_(gram.products.clone(), self.damping), pruned.float().clone()
            residual = ((weight.detach().float() - solution) @ h).mul_(keep)
            conjugate_gradients(solution, residual, h, keep, self.steps)
        return solution.to(weight.dtype), keep
