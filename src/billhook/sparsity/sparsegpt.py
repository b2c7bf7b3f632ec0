"""SparseGPT's solver (2301.00774, algorithm 1): prune column by column, and let the columns to the right make up for it.

The weight is worked on transposed, `[in_features, out_features]`, so that a column of the paper's W is a row in memory.
"""

import warnings

import torch
from torch import Tensor

from billhook.sparsity.masks import keep_layer, keep_n_of_m

MAX_DAMPING = 1.0
"""Of the mean of the Hessian's diagonal: with more, the weights' interplay would hardly count."""


def inverse_factor(products: Tensor, damping: float) -> Tensor:
    """The upper triangular U with H^-1 = U^T U, for H = X^T X + damping * mean(diag(X^T X)) * I.

    The paper's H is twice that over the number of samples, but such a factor of H changes neither mask nor update. With the
    inputs taken in reverse order H = L L^T gives H = R R^T with R upper triangular, so U = R^-1: one factorisation, and H^-1 is
    never formed. An input that is always zero has no row in the mean, and the mean as its diagonal.

    Args:
        products: X^T X, float32, `[in_features, in_features]`.
        damping: Share of the mean of the diagonal that is added to it; raised tenfold, up to 1, while H is not positive definite.

    Returns:
        U, float32, `[in_features, in_features]`.

    Raises:
        ValueError: If H is not positive definite with a damping of 1 either.
    """
    diagonal = products.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
    shares = [damping]
    while shares[-1] < MAX_DAMPING:
        shares.append(min(10 * shares[-1], MAX_DAMPING))
    for share in shares:
        reverse = products.flip(0, 1)
        reverse.diagonal().copy_((torch.where(live, diagonal, mean) + share * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            if share > damping:
                warnings.warn(f"X^T X is not positive definite: damping={damping} is raised to {share:g}", stacklevel=2)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(lower)).to(lower), upper=True)
            return factor
    raise ValueError(f"X^T X is not positive definite even with damping={MAX_DAMPING}: are the inputs finite?")


def saliency(weight: Tensor, factor: Tensor) -> Tensor:
    """W_ij^2 / U_jj^2: the error from pruning a weight when those to its left are settled (2301.00774, algorithm 1).

    Args:
        weight: `[out_features, in_features]`, float32.
        factor: U, `[in_features, in_features]`.
    """
    return (weight / factor.diagonal()).square()


def solve(
    weight: Tensor, factor: Tensor, sparsity: float, kept: tuple[int, int] | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Prunes and updates a weight, block of columns by block.

    Unstructured, the int(rows * columns * sparsity) lowest saliencies of a block go when the block is reached; N:M, the lowest
    M - N of each row's group of M when the group is reached.

    Args:
        weight: `[out_features, in_features]`, float32. It is not changed.
        factor: U with H^-1 = U^T U, float32, `[in_features, in_features]`.
        sparsity: Fraction that goes, in [0, 1), when unstructured.
        kept: (N, M), N of every M are kept; None for unstructured.
        block_size: Columns in a block; with N:M a multiple of M.

    Returns:
        The new weight, float32, and the keep-mask, both `[out_features, in_features]`.
    """
    work = weight.t().clone(memory_format=torch.contiguous_format)
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for start in range(0, len(work), block_size):
        columns = slice(start, start + block_size)
        block, local = work[columns], factor[columns, columns]
        if kept is None:
            keep[columns] = keep_layer(saliency(block.t(), local), sparsity).t()
        errors = _solve_block(block, local, keep[columns], kept)
        work[start + block_size :].addmm_(factor[columns, start + block_size :].t(), errors, alpha=-1)
    return work.t().contiguous(), keep.t().contiguous()


def _solve_block(block: Tensor, factor: Tensor, keep: Tensor, kept: tuple[int, int] | None) -> Tensor:
    """Settles each column of a block in turn; returns the errors, over U_jj, that the later blocks have to make up for."""
    errors = torch.empty_like(block)
    diagonal = factor.diagonal().tolist()
    for column in range(len(block)):
        if kept is not None and column % kept[1] == 0:
            group = slice(column, column + kept[1])
            keep[group] = keep_n_of_m(saliency(block[group].t(), factor[group, group]), *kept).t()
        torch.div(block[column].masked_fill(keep[column], 0), diagonal[column], out=errors[column])
        block[column].mul_(keep[column])
        block[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors
