"""SparseGPT: prunes column by column, and updates the columns to the right to compensate.

The weight is transposed, `[in_features, out_features]`, so that a column of the paper's W is a row in memory.
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.arguments import check_fraction, check_int, check_types
from billhook.engine import InputGram, Statistics
from billhook.linalg import cholesky_, damp_
from billhook.sparsity.criteria import Comparison, Criterion, check_finite
from billhook.sparsity.masks import keep_layer, keep_n_of_m

MAX_DAMPING = 1.0
"""Maximum damping, as a share of the mean diagonal of the Hessian; more would hide correlations."""
NARROW = 128
"""Columns of a triangular matrix that are inverted at once; wider matrices are halved."""


def inverse_factor(products: Tensor, damping: float) -> Tensor:
    """Computes the upper triangular U with H^-1 = U^T U, in float32.

    H = X^T X + damping * mean(diag(X^T X)) * I. The paper's H is twice that over the number of samples, but such a factor
    changes neither mask nor update. With the inputs in reverse order, H = L L^T gives H = R R^T with R upper triangular, so U =
    R^-1: one factorization, without forming H^-1. An input that is always zero is left out of the mean, and gets the mean as its
    diagonal.

    Args:
        products: X^T X, float32, `[in_features, in_features]`.
        damping: Share of the mean diagonal that is added to the diagonal.

    Raises:
        ValueError: If H is not positive definite even with a damping of 1.
    """
    diagonal = products.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
    shares = [damping]
    while shares[-1] < MAX_DAMPING:
        shares.append(min(10 * shares[-1], MAX_DAMPING))
    for share in shares:
        h = products.flip(0, 1)
        h.diagonal().copy_(torch.where(live, diagonal, mean).flip(0))
        lower, failed = cholesky_(damp_(h, share))
        if not failed:
            if share > damping:
                warnings.warn(f"X^T X is not positive definite: damping was raised from {damping} to {share:g}.", stacklevel=2)
            upper = lower.flip(0, 1)
            del h, lower
            return _invert(upper)
    raise ValueError(f"X^T X is not positive definite even with damping={MAX_DAMPING}. Check that the inputs are finite.")


def _invert(upper: Tensor) -> Tensor:
    """Inverts an upper triangular matrix in place, block by block.

    The inverse of [[A, B], [0, C]] is [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    half = len(upper) // 2
    if len(upper) <= NARROW:
        return upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True))
    left, right = _invert(upper[:half, :half]), _invert(upper[half:, half:])
    corner = upper[:half, half:]
    between = torch.mm(left, corner, out=torch.empty_like(corner))  # with out=, autocast keeps float32
    torch.mm(between, right, out=corner).neg_()
    return upper


def saliency(weight: Tensor, factor: Tensor) -> Tensor:
    """Computes W_ij^2 / U_jj^2: the error of pruning a weight after the columns to its left."""
    return (weight / factor.diagonal()).square()


def solve(
    weight: Tensor, factor: Tensor, sparsity: float, kept: tuple[int, int] | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Prunes and updates a weight, in blocks of columns.

    Unstructured: the int(rows * columns * sparsity) lowest saliencies of a block are removed when the block is reached. N:M: the
    lowest M - N of each row's group of M are removed when the group is reached. The input is unchanged.
    Returns the new weight, float32, and the mask, both `[out_features, in_features]`.

    Args:
        weight: The weight, `[out_features, in_features]`.
        factor: U, `[in_features, in_features]`.
        sparsity: Fraction of weights to zero.
        kept: (N, M) of an N:M pattern. None for unstructured.
        block_size: Number of columns of a block.
    """
    work = weight.t().clone(memory_format=torch.contiguous_format)
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for start in range(0, len(work), block_size):
        columns = slice(start, start + block_size)
        block, local = work[columns], factor[columns, columns]
        if kept is None:
            keep[columns] = keep_layer(saliency(block.t(), local), sparsity).t()
        errors, diagonal, block_keep = torch.empty_like(block), local.diagonal().tolist(), keep[columns]
        for column in range(len(block)):
            if kept is not None and column % kept[1] == 0:
                group = slice(column, column + kept[1])
                block_keep[group] = keep_n_of_m(saliency(block[group].t(), local[group, group]), *kept).t()
            torch.div(block[column].masked_fill(block_keep[column], 0), diagonal[column], out=errors[column])
            block[column].mul_(block_keep[column])
            block[column + 1 :].addr_(local[column, column + 1 :], errors[column], alpha=-1)
        work[start + block_size :].addmm_(factor[columns, start + block_size :].t(), errors, alpha=-1)
    return work.t().contiguous(), keep.t().contiguous()


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """Prunes column by column, and updates the weights to the right to compensate.

    With H = X^T X + damping * mean(diag(X^T X)) I and H^-1 = U^T U, U upper triangular, the saliency of a weight is W_ij^2 /
    U_jj^2, and pruning it adds -W_ij / U_jj * U_jk to each W_ik to its right. Unstructured pruning removes the lowest saliencies
    of each block of columns, by exact count; N:M removes the lowest of each row's group. Weights of an input that is always zero
    become zero, even if the mask keeps them.

    Reference: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", Frantar & Alistarh, 2023,
    https://arxiv.org/abs/2301.00774, algorithm 1.

    Args:
        damping: Share of the mean diagonal of X^T X that is added to the diagonal, in (0, 1]. Raised tenfold up to 1, with a
            warning, while the result is not positive definite.
        block_size: Number of columns whose mask is chosen at once. With N:M, a multiple of M.

    Raises:
        ValueError: If the damping is outside (0, 1], or the block size is below 1.

    Example:
        >>> sparsegpt = SparseGPT(damping=1e-4)
        >>> gram = sparsegpt.statistics(in_features=2)
        >>> gram.add(torch.tensor([[0.5, 1.0], [0.5, 1.0]]))  # the second input is always twice the first
        >>> sparsegpt.prune(torch.tensor([[2.0, 4.0]]), gram, sparsity=0.5)[0].round()
        tensor([[0., 5.]])
    """

    damping: float = 0.01
    block_size: int = 128
    compares: Comparison = field(default="layer", init=False, repr=False)
    needs = InputGram
    updates = True

    def __post_init__(self) -> None:
        check_types(SparseGPT, vars(self))
        check_fraction("damping", self.damping, f"(0, {MAX_DAMPING:g}]")
        check_int("block_size", self.block_size)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes W_ij^2 / U_jj^2 before any update, `[out_features, in_features]`."""
        gram = self._of_inputs(statistics, weight, InputGram)
        return saliency(_without_dead(weight, gram), inverse_factor(gram.products, self.damping))

    def solve(
        self, weight: Tensor, statistics: Statistics | None, sparsity: float, kept: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Zeroes the lowest saliencies and updates the kept weights. See `Criterion.prune`.

        Raises:
            ValueError: If the block size is not a multiple of M.
        """
        if kept is not None and self.block_size % kept[1]:
            raise ValueError(f"block_size={self.block_size} must be a multiple of {kept[1]} for pattern='{kept[0]}:{kept[1]}'.")
        gram = self._of_inputs(statistics, weight, InputGram)
        factor = inverse_factor(gram.products, self.damping)
        solved, keep = solve(_without_dead(weight, gram), factor, sparsity, kept, self.block_size)
        updated = solved.to(weight.dtype)
        check_finite(updated, f"the updated weight, as {weight.dtype},")
        return updated, keep


def _without_dead(weight: Tensor, statistics: Statistics) -> Tensor:
    return weight.detach().float().masked_fill(statistics.squares == 0, 0)
