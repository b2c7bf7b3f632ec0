"""Solves for the weights of a linear that make up best for inputs that are removed, in closed form, from moments of the inputs.

The closed form is that of "ZipLM: Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023,
https://arxiv.org/abs/2302.04089) and "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization" (Meng, Ibrahim, Behdin, Hazimeh, Ponomareva & Mazumder, 2024, https://arxiv.org/abs/2403.12983), with a ridge
towards the old weights instead of one towards zero, chosen on held-out data.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.linalg import conjugate_gradients, ridge_solver
from billhook.repairs.residuals import ALL_ROWS, MAX_OUTPUTS, Fold, ResidualStatistics, as_float

Solve = Callable[[slice], Tensor]
"""With some of the outputs, what is added to their weights, `[outputs, in_features]`, float64."""

STEPS = 30
"""Of conjugate gradients, where weights stay zero."""


def least(ridges: Sequence[float], without: Tensor, errors: Tensor) -> float:
    """Chooses the ridge with which solutions err least on held-out data; infinity if none helps.

    Args:
        ridges: The ridges.
        without: The error of each fold without a refit, `[folds]`, of which errors count as shares.
        errors: The error with each ridge, `[ridges, folds]`, NaN where there is no solution.
    """
    shares: list[float] = (errors / without.clamp(min=torch.finfo(torch.float64).tiny)).mean(1).tolist()  # one question
    solved = ((share, ridge) for share, ridge in zip(shares, ridges, strict=True) if not math.isnan(share))
    return min([(1.0, math.inf), *solved], key=lambda pair: pair[0])[1]


def choose_ridge(folds: Sequence[Fold], centred: bool, ridges: Sequence[float], comm: Comm = SINGLE_PROCESS) -> float:
    """Chooses the ridge with which solutions err least on held-out data, on the first rank; infinity if none helps."""
    errors = folds[0][1].tokens.new_zeros(len(ridges), len(folds))  # NaN without a solution
    pieces = [(row, column) for row in range(len(ridges)) for column in range(len(folds))]
    for (row, column), is_own in zip(pieces, comm.owned_pieces([1.0] * len(pieces)), strict=True):
        if is_own:
            parts, held_out = folds[column]
            errors[row, column] = residual_error(solve_ridge(parts, centred, ridges[row]), parts, held_out, centred)
    comm.sum_(errors)
    # one rank decides: sums may be rounded otherwise on another
    return comm.decide(lambda: least(ridges, errors_without_refit(folds, centred), errors))


def solve_ridge(parts: Sequence[ResidualStatistics], centred: bool, ridge: float) -> Tensor:
    """Solves for M, what is added to a weight that is fitted to parts of the data: E d x^T (H + ridge D)^-1, float64.

    It is the minimum of E |d - M x|^2 + ridge |M D^1/2|^2, H = E x x^T and D its diagonal; about the means, if a bias makes up
    for those. An infinite ridge gives zero. NaN if the ridge is too small for moments that rounding has left without an inverse.
    """
    solve, _ = ridge_solver(_inner(parts, centred), ridge)
    return solve(_owed(parts, centred))


def refit_linear(
    weight: Tensor,
    bias: Tensor | None,
    folds: Sequence[Fold],
    every: Sequence[ResidualStatistics],
    ridges: Sequence[float],
    comm: Comm = SINGLE_PROCESS,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Refits a linear's weight and bias to give d in addition: chooses the ridge on held-out data, solves on all.

    W' = W + M, M = E d x^T (H + ridge D)^-1, from the moments of all inputs x that it has: H = E x x^T, D its diagonal. A bias
    makes up for the mean of what is missing, b' = b + E d - M E x, float64, and M for the rest. Where all data has no solution
    with that ridge, the next larger one takes its place. Beside the moments, memory holds half of a matrix of in_features^2, and
    `MAX_OUTPUTS` rows of one like the weight for each part; on a support, a whole such matrix, and six of such rows. Ridges are
    tried on mixtures of the outputs, where there are many (`ResidualStatistics.mixed`). Ranks have the same moments, and
    divide what is tried and the outputs that are solved for.

    Where weights are to stay zero, off their `support`, bool, M is the best on it with that ridge, by conjugate gradients; what
    is tried is without this bound, but where M on the support then helps no held-out data, M is zero.
    """
    centred = bias is not None
    ridge = choose_ridge(_mixed(folds), centred, ridges, comm)
    if support is None:
        solve = _solving(every, centred, sorted({ridge, math.inf, *(larger for larger in ridges if larger > ridge)}), comm)
    else:
        errors = _bound_errors(folds, centred, ridge, support, comm)
        helps = comm.decide(lambda: least([ridge], errors_without_refit(folds, centred), errors[None]) == ridge)
        solve = _bound(every, centred, ridge if helps else math.inf, support)
    new, shift = torch.zeros_like(weight), torch.zeros_like(every[0].owed_sums)
    for rows in comm.owned_rows(len(weight), MAX_OUTPUTS):  # each rank has rows of its own
        more = solve(rows)
        shift[rows] = bias_shift(more, every, rows)
        new[rows] = more.add_(weight[rows])
    total = as_float(new)
    comm.sum_(total, *([shift] if centred else []))
    return total.to(weight.dtype), None if bias is None else bias.double() + shift


def _mixed(folds: Sequence[Fold]) -> list[Fold]:
    """Returns folds of which each part has a bounded number of outputs."""
    mixed = {part: part.mixed() for others, held_out in folds for part in (*others, held_out)}
    return [([mixed[part] for part in others], mixed[held_out]) for others, held_out in folds]


def _solving(parts: Sequence[ResidualStatistics], centred: bool, ridges: Sequence[float], comm: Comm) -> Solve:
    """Solves with the first ridge that has a solution on the first rank."""
    solves = (ridge_solver(_inner(parts, centred), ridge) for ridge in ridges)
    solve = next(solve for solve, exists in solves if comm.decide(lambda: bool(exists)))  # noqa: B023 - called at once
    return lambda rows: solve(_owed(parts, centred, rows))


def errors_without_refit(folds: Sequence[Fold], centred: bool) -> Tensor:
    """Computes what is erred on the held-out data of each fold, `[folds]`, where nothing is added to a weight."""
    return torch.stack([held_out.error(None, _means(parts)[1] if centred else None) for parts, held_out in folds])


def _inner(parts: Sequence[ResidualStatistics], centred: bool) -> Tensor:
    """Returns the means of x x^T over parts of the data."""
    x, _ = _means(parts)
    return _mean([part.products for part in parts], _tokens(parts), (x, x) if centred else None)


def _owed(parts: Sequence[ResidualStatistics], centred: bool, rows: slice = ALL_ROWS) -> Tensor:
    """Returns the means of d x^T over parts of the data, for some features of d."""
    x, d = _means(parts)
    return _mean([part.owed_products[rows] for part in parts], _tokens(parts), (d[rows], x) if centred else None)


def _mean(sums: Sequence[Tensor], count: Tensor, centre: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns the sum of matrices over a count, about a centre (c, e), if there is one: less c e^T."""
    mean = torch.zeros_like(sums[0])
    for of_part in sums:
        mean += of_part
    mean /= count
    return mean if centre is None else mean.addr_(*centre, alpha=-1)


def _bound(parts: Sequence[ResidualStatistics], centred: bool, ridge: float, support: Tensor) -> Solve:
    """Solves for what is added on a support, by conjugate gradients from zero."""
    if ridge == math.inf:
        return lambda rows: torch.zeros_like(parts[0].owed_products[rows])
    inner = _inner(parts, centred)
    diagonal = inner.diagonal()
    diagonal += ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum()

    def solve(rows: slice) -> Tensor:
        owed = _owed(parts, centred, rows).mul_(support[rows])
        return conjugate_gradients(torch.zeros_like(owed), owed, inner, support[rows], STEPS)

    return solve


def _bound_errors(folds: Sequence[Fold], centred: bool, ridge: float, support: Tensor, comm: Comm) -> Tensor:
    """Computes what is erred on the held-out data of each fold, `[folds]`, with what is added on a support.

    Each rank has rows of its own.
    """
    errors = folds[0][1].tokens.new_zeros(len(folds))
    for number, (parts, held_out) in enumerate(folds):
        solve = _bound(parts, centred, ridge, support)
        for rows in comm.owned_rows(len(support), MAX_OUTPUTS):
            errors[number] += residual_error(solve(rows), parts, held_out, centred, rows)
    return comm(errors)


def residual_error(
    more: Tensor, parts: Sequence[ResidualStatistics], held_out: ResidualStatistics, centred: bool, rows: slice = ALL_ROWS
) -> Tensor:
    """Computes what is erred on what is held out with what is added to a weight, fitted to parts of the data."""
    return held_out.error(more, bias_shift(more, parts, rows) if centred else None, rows)


def bias_shift(more: Tensor, parts: Sequence[ResidualStatistics], rows: slice = ALL_ROWS) -> Tensor:
    """Computes what a bias adds, `[outputs]`."""
    x, d = _means(parts)
    return d[rows] - more @ x


def _means(parts: Sequence[ResidualStatistics]) -> tuple[Tensor, Tensor]:
    tokens = _tokens(parts)
    x, d = torch.stack([part.sums for part in parts]), torch.stack([part.owed_sums for part in parts])
    return x.sum(0) / tokens, d.sum(0) / tokens


def _tokens(parts: Sequence[ResidualStatistics]) -> Tensor:
    return torch.stack([part.tokens for part in parts]).sum()
