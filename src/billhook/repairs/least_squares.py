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

from billhook.repairs.moments import Fold, OwedMoments, SecondMoments
from billhook.running.conjugate_gradients import on_support
from billhook.running.ranks import Ranks, own_of

Errors = Callable[[float], Sequence[float] | None]
"""With a ridge, the error on each fold's held-out data; None where some fold has no solution."""


STEPS = 30
"""Of conjugate gradients, where weights stay zero."""
MIRRORED = 256
"""Rows that are mirrored at once, beside which three squares of them are needed."""


def least(ridges: Sequence[float], without: Sequence[float], errors: Errors) -> float:
    """Chooses the ridge with which solutions err least on held-out data; infinity if none helps.

    The error of each fold counts as a share of the one `without` a refit. Ridges that have no solution are skipped.
    """
    shares = {math.inf: 1.0}
    for ridge in ridges:
        if (found := errors(ridge)) is not None:
            whole = (max(one, torch.finfo(torch.float64).tiny) for one in without)
            shares[ridge] = sum(error / one for error, one in zip(found, whole, strict=True)) / len(found)
    return min(shares, key=lambda ridge: shares[ridge])


def solve(inner: Tensor, owed: Tensor, ridge: float) -> Tensor | None:
    """Solves for M = owed (H + ridge D)^-1, D the diagonal of H, in the memory of both, float64.

    Args:
        inner: H, `[in_features, in_features]`, of which the upper triangle is read, column after column in memory.
        owed: `[out_features, in_features]`, row after row in memory.
        ridge: At infinity M is zero.

    Returns:
        M, in the place of `owed`; None if the ridge is too small for moments that rounding has left without an inverse.
    """
    diagonal = inner.diagonal()
    if ridge == math.inf or not diagonal.any():
        return owed.zero_()
    diagonal += ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum()
    failed = torch.zeros((), dtype=torch.int32, device=inner.device)
    torch.linalg.cholesky_ex(inner, upper=True, out=(inner, failed))
    if failed:
        return None
    torch.linalg.solve_triangular(inner, owed, upper=True, left=False, out=owed)
    torch.linalg.solve_triangular(inner.mT, owed, upper=False, left=False, out=owed)
    return owed


def solve_ridge(weight: Tensor, keep: Tensor, second: SecondMoments, ridge: float) -> Tensor | None:
    """Solves for the weights that do best from some inputs: W' = argmin E ||W x + d - W' x||^2 + ridge, float64.

    With S the inputs that are kept, R those removed, H the second moments of the inputs and D the diagonal of H_SS:
    W'_S = W_S + (W_R H_RS + E d x_S^T) (H_SS + ridge D)^-1, W'_R = 0, the minimum of
    E ||W x + d - W'_S x_S||^2 + ridge ||(W'_S - W_S) D^1/2||^2. An infinite ridge leaves W'_S at W_S. Where a bias makes up
    for the means, the second moments, float64, are about those. None if the ridge is too small for moments that rounding has left
    without an inverse.
    """
    rows = second.inputs[keep]
    lost = weight[:, ~keep].double() @ rows[:, ~keep].t() + second.owed[:, keep]
    more = solve(rows[:, keep].t(), lost.contiguous(), ridge)
    if more is None:
        return None
    new = torch.where(keep, weight.double(), 0)
    new[:, keep] += more
    return new


def choose_ridge(
    weight: Tensor, keep: Tensor, folds: Sequence[tuple[SecondMoments, SecondMoments]], ridges: Sequence[float]
) -> float:
    """Chooses the ridge with which solutions on some inputs err least on held-out data, about the same means."""

    def errors(ridge: float) -> list[float] | None:
        found = [solve_ridge(weight, keep, second, ridge) for second, _ in folds]
        each = zip(found, folds, strict=True)
        left = [held_out.error(weight.double() - new) for new, (_, held_out) in each if new is not None]
        return left if len(left) == len(folds) else None

    cut = weight.double() * ~keep
    return least(ridges, [held_out.error(cut) for _, held_out in folds], errors)


def refit_linear(
    weight: Tensor,
    bias: Tensor | None,
    folds: Sequence[Fold],
    every: Sequence[OwedMoments],
    ridges: Sequence[float],
    reduce: Callable[[Tensor], Tensor] | None = None,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Refits a linear's weight and bias, float64, to give d in addition: chooses the ridge on held-out data, solves on all.

    W' = W + M, with M as of `solve`, from the moments of all inputs x that it has. A bias makes up for the mean of what is
    missing, b' = b + E d - M E x, and M for the rest. Where all data has no solution with that ridge, the next larger one takes
    its place. Beside the moments, memory holds a matrix of in_features^2, and one like the weight, six on a support. Ridges are
    tried on mixtures of the outputs, where there are many (`OwedMoments.mixed`). Ranks that have the same moments (`Ranks`)
    divide what is tried.

    Where weights are to stay zero, off their `support`, bool, M is the best on it with that ridge, by conjugate gradients; what
    is tried is without this bound, but where M on the support then helps no held-out data, M is zero.
    """
    centred = bias is not None
    ridge = _chosen(_mixed(folds), centred, ridges, reduce)
    if support is None:
        larger = sorted({ridge, math.inf, *(one for one in ridges if one > ridge)})
        new = next(more for one in larger if (more := _more(every, centred, one)) is not None)
    else:
        left = [_left(_bound(parts, centred, ridge, support), parts, held_out, centred) for parts, held_out in folds]
        helps = least([ridge], _without(folds, centred), lambda _: left) == ridge
        new = _bound(every, centred, ridge if helps else math.inf, support)
    shift = _shift(new, every)
    return new.add_(weight), None if bias is None else bias.double() + shift


def _mixed(folds: Sequence[Fold]) -> list[Fold]:
    """Returns folds of which each part has a bounded number of outputs."""
    mixed = {part: part.mixed() for own, held_out in folds for part in (*own, held_out)}
    return [([mixed[part] for part in own], mixed[held_out]) for own, held_out in folds]


def _chosen(folds: Sequence[Fold], centred: bool, ridges: Sequence[float], reduce: Callable[[Tensor], Tensor] | None) -> float:
    """Chooses the ridge on held-out data; infinity if none helps."""
    tried = _tried(folds, centred, ridges, reduce)
    return least(ridges, _without(folds, centred), lambda one: None if (own := tried[one]).isnan().any() else own.tolist())


def _without(folds: Sequence[Fold], centred: bool) -> list[float]:
    """Computes what is erred on the held-out data of each fold where nothing is added to a weight."""
    return [_left(torch.zeros_like(held_out.owed_products), parts, held_out, centred) for parts, held_out in folds]


def _tried(
    folds: Sequence[Fold], centred: bool, ridges: Sequence[float], reduce: Callable[[Tensor], Tensor] | None
) -> dict[float, Tensor]:
    """Computes with each ridge what is erred on the held-out data of each fold, `[folds]`, NaN where there is no solution."""
    errors = folds[0][1].tokens.new_zeros(len(ridges), len(folds))
    pieces = [(row, column) for row in range(len(ridges)) for column in range(len(folds))]
    for (row, column), own in zip(pieces, own_of([1.0] * len(pieces), reduce), strict=True):
        if own:
            error = _error(*folds[column], centred, ridges[row])
            errors[row, column] = math.nan if error is None else error
    if isinstance(reduce, Ranks):
        reduce(errors)
    return dict(zip(ridges, errors, strict=True))


def _more(parts: Sequence[OwedMoments], centred: bool, ridge: float) -> Tensor | None:
    """Solves for what is added to a weight that is fitted to parts of the data; about the means, if a bias makes up for those."""
    return solve(*_normal(parts, centred), ridge)


def _normal(parts: Sequence[OwedMoments], centred: bool) -> tuple[Tensor, Tensor]:
    """Returns the means of x x^T, whose upper triangle is filled, column after column, and of d x^T, over parts of the data."""
    (x, d), tokens = _means(parts), _tokens(parts)
    inner, owed = x.new_zeros(len(x), len(x)), torch.zeros_like(parts[0].owed_products)
    for part in parts:
        part.products.add_to(inner)
        owed += part.owed_products
    for sums, mean in ((inner, x), (owed, d)):
        sums /= tokens
        if centred:
            sums.addr_(mean, x, alpha=-1)
    return inner.t(), owed


def _bound(parts: Sequence[OwedMoments], centred: bool, ridge: float, support: Tensor) -> Tensor:
    """Solves for what is added on a support, by conjugate gradients from zero."""
    inner, owed = _normal(parts, centred)
    if ridge == math.inf:
        return owed.zero_()
    _mirror(inner)
    diagonal = inner.diagonal()
    diagonal += ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum()
    return on_support(torch.zeros_like(owed), owed.mul_(support), inner, support, STEPS)


def _mirror(upper: Tensor) -> None:
    """Makes a matrix symmetric, of which the upper triangle is filled, in its place."""
    for first in range(0, len(upper), MIRRORED):
        last = first + MIRRORED
        own = upper[first:last, first:last]
        own.copy_(own.triu() + own.triu(1).t())
        upper[last:, first:last] = upper[first:last, last:].t()


def _error(parts: Sequence[OwedMoments], held_out: OwedMoments, centred: bool, ridge: float) -> float | None:
    """Computes what a linear that is fitted to parts of the data errs on what is held out; None where there is no solution."""
    more = _more(parts, centred, ridge)
    return None if more is None else _left(more, parts, held_out, centred)


def _left(more: Tensor, parts: Sequence[OwedMoments], held_out: OwedMoments, centred: bool) -> float:
    """Computes what is erred on what is held out with what is added to a weight, fitted to parts of the data."""
    return held_out.error(more, _shift(more, parts) if centred else None)


def _shift(more: Tensor, parts: Sequence[OwedMoments]) -> Tensor:
    """Computes what a bias adds, `[out_features]`."""
    x, d = _means(parts)
    return d - more @ x


def _means(parts: Sequence[OwedMoments]) -> tuple[Tensor, Tensor]:
    tokens = _tokens(parts)
    x, d = (torch.stack(sums).sum(0) / tokens for sums in ([one.sums for one in parts], [one.owed_sums for one in parts]))
    return x, d


def _tokens(parts: Sequence[OwedMoments]) -> Tensor:
    return torch.stack([part.tokens for part in parts]).sum()
