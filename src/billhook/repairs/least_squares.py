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

from billhook.engine import SINGLE_PROCESS, Comm
from billhook.linalg import conjugate_gradients, ridge_solver
from billhook.repairs.residuals import ALL_ROWS, MAX_OUTPUTS, ResidualStatistics, as_float

Solve = Callable[[slice], Tensor]
"""Function of some output rows that returns their weight update, `[outputs, in_features]`, float64."""

CG_STEPS = 30
"""Steps of conjugate gradients, for layers whose zero weights stay zero."""


def best_ridge(ridges: Sequence[float], baseline: Tensor, errors: Tensor) -> float:
    """Returns the ridge penalty with the lowest held-out error; infinity if none helps.

    `errors`, `[ridges]`, are NaN without a solution. Without a refit, the error is `baseline`, `[]`.
    """
    least, *solved = torch.cat([baseline[None], errors]).tolist()  # one host sync
    pairs = [(error, ridge) for error, ridge in zip(solved, ridges, strict=True) if not math.isnan(error)]
    return min([(least, math.inf), *pairs], key=lambda pair: pair[0])[1]


def choose_ridge(
    parts: Sequence[ResidualStatistics], about_means: bool, ridges: Sequence[float], comm: Comm = SINGLE_PROCESS
) -> float:
    """Chooses the ridge penalty by the error on the last part; infinity if none helps.

    Args:
        parts: Statistics of the parts of the data; the last is held out.
        about_means: Whether a bias absorbs the means.
        ridges: Candidate ridge penalties.
        comm: The ranks, which have equal statistics and divide the candidates.
    """
    *fit, held_out = parts
    errors = held_out.tokens.new_zeros(len(ridges))  # NaN without a solution
    for number, is_own in enumerate(comm.owned_pieces([1.0] * len(ridges))):
        if is_own:
            errors[number] = residual_error(solve_ridge(fit, about_means, ridges[number]), fit, held_out, about_means)
    comm.sum_(errors)
    # decided on the first rank, because ranks may round sums differently
    return comm.decide(lambda: best_ridge(ridges, error_without_refit(parts, about_means), errors))


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
    parts: Sequence[ResidualStatistics],
    ridges: Sequence[float],
    comm: Comm = SINGLE_PROCESS,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Refits weight and bias of a layer so that its output also contains the residual r.

    W' = W + M, with M = E r x^T (H + ridge D)^-1 from the statistics of all remaining inputs x: H = E x x^T with diagonal D. A
    bias absorbs the mean of the residual, b' = b + E r - M E x, float64, and M the rest. The ridge penalty is chosen on the last
    part, and M is solved on all parts; if that has no solution, the next larger penalty is used. Next to the statistics, memory
    holds a Gram matrix of all inputs, `[in_features, in_features]` in float64, which is factored in place, and a few times
    `MAX_OUTPUTS` rows like the weight's. For layers with many outputs, penalties are tried on random mixtures of outputs
    (`ResidualStatistics.mixed`).

    With a `support`, weights outside stay zero, and M is found on it by conjugate gradients. Penalties are tried without
    the support; if M on the support does not reduce the held-out error, M is zero.

    Args:
        weight: The weight, `[out_features, in_features]`.
        bias: The bias, `[out_features]`, if any.
        parts: Statistics of the parts of the data; the last chooses the ridge penalty.
        ridges: Candidate ridge penalties.
        comm: The ranks, which have equal statistics, and divide candidates and output rows.
        support: Mask of weights that may change, bool, in the shape of the weight. None for all.
    """
    about_means = bias is not None
    # penalties are tried on a limited number of outputs
    ridge = choose_ridge([part.mixed() for part in parts], about_means, ridges, comm)
    if support is None:
        solve = _solve_directly(
            parts, about_means, sorted({ridge, math.inf, *(larger for larger in ridges if larger > ridge)}), comm
        )
    else:
        *fit, held_out = parts
        error, solve = held_out.tokens.new_zeros(()), _solve_on_support(fit, about_means, ridge, support)
        for rows in comm.owned_rows(len(support), MAX_OUTPUTS):  # ranks divide the rows
            error += residual_error(solve(rows), fit, held_out, about_means, rows)
        del solve  # frees its Gram matrix
        error = comm(error)
        helps = comm.decide(lambda: best_ridge([ridge], error_without_refit(parts, about_means), error[None]) == ridge)
        solve = _solve_on_support(parts, about_means, ridge if helps else math.inf, support)
    new, shift = torch.zeros_like(weight), torch.zeros_like(parts[0].residual_sums)
    for rows in comm.owned_rows(len(weight), MAX_OUTPUTS):  # ranks divide the rows
        update = solve(rows)
        shift[rows] = bias_shift(update, parts, rows)
        new[rows] = update.add_(weight[rows])
    total = as_float(new)
    comm.sum_(total, *([shift] if about_means else []))
    return total.to(weight.dtype), None if bias is None else bias.double() + shift


def _solve_directly(parts: Sequence[ResidualStatistics], about_means: bool, ridges: Sequence[float], comm: Comm) -> Solve:
    """Solves with the first ridge penalty that has a solution on the first rank."""
    solves = (ridge_solver(_gram(parts, about_means), ridge) for ridge in ridges)
    solve = next(solve for solve, exists in solves if comm.decide(lambda: bool(exists)))  # noqa: B023 - called at once
    return lambda rows: solve(_residual_gram(parts, about_means, rows))


def error_without_refit(parts: Sequence[ResidualStatistics], about_means: bool) -> Tensor:
    """Computes the error on the last part without a refit."""
    *fit, held_out = parts
    return held_out.error(None, _means(fit)[1] if about_means else None)


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


def residual_error(
    update: Tensor, parts: Sequence[ResidualStatistics], held_out: ResidualStatistics, about_means: bool, rows: slice = ALL_ROWS
) -> Tensor:
    """Computes the error of a weight update on held-out data; a bias is fitted to `parts`.

    Args:
        update: Weight update, `[outputs, in_features]`.
        parts: Statistics that the bias is fitted to.
        held_out: Statistics of held-out data.
        about_means: Whether there is a bias.
        rows: Output rows of the update. Defaults to all.
    """
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
