"""Closed-form least-squares update of a linear layer, from Gram matrices of its inputs.

The closed form is that of "ZipLM: Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023,
https://arxiv.org/abs/2302.04089) and "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization" (Meng, Ibrahim, Behdin, Hazimeh, Ponomareva & Mazumder, 2024, https://arxiv.org/abs/2403.12983), with a ridge
penalty toward the old weights instead of zero, chosen on held-out data.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.linalg import conjugate_gradients, ridge_solver
from billhook.repairs.residuals import ALL_ROWS, MAX_OUTPUTS, Fold, ResidualStatistics, as_float

Solve = Callable[[slice], Tensor]
"""Function of some output rows that returns their weight update, `[outputs, in_features]`, float64."""

CG_STEPS = 30
"""Steps of conjugate gradients, for layers whose zero weights stay zero."""


def best_ridge(ridges: Sequence[float], baseline: Tensor, errors: Tensor) -> float:
    """Returns the ridge penalty with the lowest held-out error; infinity if none helps.

    Args:
        ridges: Ridge penalties.
        baseline: Error of each fold without a refit, `[folds]`.
        errors: Error with each ridge penalty, `[ridges, folds]`; NaN without a solution.
    """
    shares: list[float] = (errors / baseline.clamp(min=torch.finfo(torch.float64).tiny)).mean(1).tolist()  # one host sync
    solved = ((share, ridge) for share, ridge in zip(shares, ridges, strict=True) if not math.isnan(share))
    return min([(1.0, math.inf), *solved], key=lambda pair: pair[0])[1]


def choose_ridge(folds: Sequence[Fold], about_means: bool, ridges: Sequence[float], comm: Comm = SINGLE_PROCESS) -> float:
    """Chooses the ridge penalty by held-out error, on the first rank; infinity if none helps."""
    errors = folds[0][1].tokens.new_zeros(len(ridges), len(folds))  # NaN without a solution
    trials = [(row, column) for row in range(len(ridges)) for column in range(len(folds))]
    for (row, column), is_own in zip(trials, comm.owned_pieces([1.0] * len(trials)), strict=True):
        if is_own:
            parts, held_out = folds[column]
            errors[row, column] = residual_error(solve_ridge(parts, about_means, ridges[row]), parts, held_out, about_means)
    comm.sum_(errors)
    # decided on the first rank, because ranks may round sums differently
    return comm.decide(lambda: best_ridge(ridges, errors_without_refit(folds, about_means), errors))


def solve_ridge(parts: Sequence[ResidualStatistics], about_means: bool, ridge: float) -> Tensor:
    """Solves for the weight update M = E r x^T (H + ridge D)^-1, float64.

    M minimizes E |r - M x|^2 + ridge |M D^1/2|^2, with H = E x x^T and its diagonal D; about the means if a bias absorbs these.
    An infinite ridge penalty gives zero. NaN if the penalty is too small for a numerically singular H.
    """
    solve, _ = ridge_solver(_gram(parts, about_means), ridge)
    return solve(_residual_gram(parts, about_means))


def refit_linear(
    weight: Tensor,
    bias: Tensor | None,
    folds: Sequence[Fold],
    all_parts: Sequence[ResidualStatistics],
    ridges: Sequence[float],
    comm: Comm = SINGLE_PROCESS,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Refits weight and bias of a layer so that its output also contains the residual r.

    W' = W + M, with M = E r x^T (H + ridge D)^-1 from the statistics of all remaining inputs x: H = E x x^T with diagonal D. A
    bias absorbs the mean of the residual, b' = b + E r - M E x, float64, and M the rest. The ridge penalty is chosen on held-out
    data, and M is solved on all data; if that has no solution, the next larger penalty is used. Next to the statistics, memory
    holds half of an in_features^2 matrix and `MAX_OUTPUTS` rows like the weight's for each part; with a support, a full such
    matrix and six of such rows. For layers with many outputs, penalties are tried on random mixtures of outputs
    (`ResidualStatistics.mixed`). Ranks have equal statistics, and divide trials and output rows.

    With a `support` (bool), weights outside stay zero, and M is found on it by conjugate gradients. Penalties are tried without
    the support; if M on the support does not reduce the held-out error, M is zero.
    """
    about_means = bias is not None
    ridge = choose_ridge(_mixed(folds), about_means, ridges, comm)
    if support is None:
        solve = _solve_directly(
            all_parts, about_means, sorted({ridge, math.inf, *(larger for larger in ridges if larger > ridge)}), comm
        )
    else:
        errors = _support_errors(folds, about_means, ridge, support, comm)
        helps = comm.decide(lambda: best_ridge([ridge], errors_without_refit(folds, about_means), errors[None]) == ridge)
        solve = _solve_on_support(all_parts, about_means, ridge if helps else math.inf, support)
    new, shift = torch.zeros_like(weight), torch.zeros_like(all_parts[0].residual_sums)
    for rows in comm.owned_rows(len(weight), MAX_OUTPUTS):  # ranks divide the rows
        update = solve(rows)
        shift[rows] = bias_shift(update, all_parts, rows)
        new[rows] = update.add_(weight[rows])
    total = as_float(new)
    comm.sum_(total, *([shift] if about_means else []))
    return total.to(weight.dtype), None if bias is None else bias.double() + shift


def _mixed(folds: Sequence[Fold]) -> list[Fold]:
    """Returns folds whose parts have a limited number of outputs."""
    mixed = dict[ResidualStatistics, ResidualStatistics]()
    for others, held_out in folds:
        for part in (*others, held_out):
            if part not in mixed:
                mixed[part] = part.mixed()
    return [([mixed[part] for part in others], mixed[held_out]) for others, held_out in folds]


def _solve_directly(parts: Sequence[ResidualStatistics], about_means: bool, ridges: Sequence[float], comm: Comm) -> Solve:
    """Solves with the first ridge penalty that has a solution on the first rank."""
    solves = (ridge_solver(_gram(parts, about_means), ridge) for ridge in ridges)
    solve = next(solve for solve, exists in solves if comm.decide(lambda: bool(exists)))  # noqa: B023 - called at once
    return lambda rows: solve(_residual_gram(parts, about_means, rows))


def errors_without_refit(folds: Sequence[Fold], about_means: bool) -> Tensor:
    """Computes the error on the held-out data of each fold, `[folds]`, without a refit."""
    return torch.stack([held_out.error(None, _means(parts)[1] if about_means else None) for parts, held_out in folds])


def _gram(parts: Sequence[ResidualStatistics], about_means: bool) -> Tensor:
    """Returns the mean of x x^T over parts of the data."""
    x, _ = _means(parts)
    return _mean([part.products for part in parts], _tokens(parts), (x, x) if about_means else None)


def _residual_gram(parts: Sequence[ResidualStatistics], about_means: bool, rows: slice = ALL_ROWS) -> Tensor:
    """Returns the mean of r x^T over parts of the data, for some rows of r."""
    x, d = _means(parts)
    return _mean([part.residual_products[rows] for part in parts], _tokens(parts), (d[rows], x) if about_means else None)


def _mean(sums: Sequence[Tensor], count: Tensor, center: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns the sum of matrices over a count, minus the outer product c e^T of a center."""
    mean = torch.zeros_like(sums[0])
    for part in sums:
        mean += part
    mean /= count
    return mean if center is None else mean.addr_(*center, alpha=-1)


def _solve_on_support(parts: Sequence[ResidualStatistics], about_means: bool, ridge: float, support: Tensor) -> Solve:
    """Solves for the update on a support, by conjugate gradients from zero."""
    if ridge == math.inf:
        return lambda rows: torch.zeros_like(parts[0].residual_products[rows])
    gram = _gram(parts, about_means)
    diagonal = gram.diagonal()
    diagonal += ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum()

    def solve(rows: slice) -> Tensor:
        target = _residual_gram(parts, about_means, rows).mul_(support[rows])
        return conjugate_gradients(torch.zeros_like(target), target, gram, support[rows], CG_STEPS)

    return solve


def _support_errors(folds: Sequence[Fold], about_means: bool, ridge: float, support: Tensor, comm: Comm) -> Tensor:
    """Computes the held-out error of each fold with an update on a support, `[folds]`.

    Ranks divide the rows.
    """
    errors = folds[0][1].tokens.new_zeros(len(folds))
    for number, (parts, held_out) in enumerate(folds):
        solve = _solve_on_support(parts, about_means, ridge, support)
        for rows in comm.owned_rows(len(support), MAX_OUTPUTS):
            errors[number] += residual_error(solve(rows), parts, held_out, about_means, rows)
    return comm(errors)


def residual_error(
    update: Tensor, parts: Sequence[ResidualStatistics], held_out: ResidualStatistics, about_means: bool, rows: slice = ALL_ROWS
) -> Tensor:
    """Computes the error of a weight update on held-out data; a bias is fitted to `parts`."""
    return held_out.error(update, bias_shift(update, parts, rows) if about_means else None, rows)


def bias_shift(update: Tensor, parts: Sequence[ResidualStatistics], rows: slice = ALL_ROWS) -> Tensor:
    """Computes the update of a bias, `[outputs]`."""
    x, d = _means(parts)
    return d[rows] - update @ x


def _means(parts: Sequence[ResidualStatistics]) -> tuple[Tensor, Tensor]:
    tokens = _tokens(parts)
    x, d = torch.stack([part.sums for part in parts]), torch.stack([part.residual_sums for part in parts])
    return x.sum(0) / tokens, d.sum(0) / tokens


def _tokens(parts: Sequence[ResidualStatistics]) -> Tensor:
    return torch.stack([part.tokens for part in parts]).sum()
