"""Solves for the weights of a linear that make up best for inputs that are removed, in closed form, from moments of the inputs.

The closed form is that of "ZipLM: Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023,
https://arxiv.org/abs/2302.04089) and "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization" (Meng, Ibrahim, Behdin, Hazimeh, Ponomareva & Mazumder, 2024, https://arxiv.org/abs/2403.12983), with a ridge
towards the old weights instead of one towards zero, chosen on held-out data.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from billhook.running.statistics import TOKENS, add_products


class OwedMoments:
    """First and second moments of a linear's inputs, and of what it owes in addition to its own output, float64.

    Attributes:
        tokens: How many tokens were added, each with its weight, `[]`.
        sums: The sum of their inputs x, `[in_features]`.
        products: The sum of x x^T, `[in_features, in_features]`.
        owed_sums: The sum of what is owed, d, `[out_features]`.
        owed_products: The sum of d x^T, `[out_features, in_features]`.
        owed_squares: The sum of |d|^2, `[]`.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.sums, self.owed_sums = self.tokens.new_zeros(in_features), self.tokens.new_zeros(out_features)
        self.products = self.tokens.new_zeros(in_features, in_features)
        self.owed_products = self.tokens.new_zeros(out_features, in_features)
        self.owed_squares = self.tokens.clone()

    def add(self, inputs: Tensor, owed: Tensor | None = None, keep: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds what a linear is given in one call; multiplied in float32, or in float64 if the inputs are.

        Args:
            inputs: `[..., in_features]`, of any floating dtype.
            owed: Addition that its outputs need, `[..., out_features]`, if any.
            keep: Which tokens count, bool, `[...]`; all if None.
            weights: How much each token counts, `[...]`; all one if None.
        """
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        each = torch.split(_flat(weights[..., None], keep).to(torch.promote_types(inputs.dtype, torch.float32)), TOKENS)
        chunks = torch.split(_flat(inputs, keep), TOKENS)
        for chunk, share in zip(chunks, each, strict=True):
            weighted = wide(chunk) * share
            self.tokens += share.sum(dtype=torch.float64)
            self.sums += weighted.sum(0, dtype=torch.float64)
            add_products(self.products, weighted, wide(chunk))
        if owed is not None:
            for chunk, due, share in zip(chunks, torch.split(_flat(owed, keep), TOKENS), each, strict=True):
                weighted = wide(due) * share
                self.owed_sums += weighted.sum(0, dtype=torch.float64)
                add_products(self.owed_products, weighted, wide(chunk))
                self.owed_squares += (weighted * wide(due)).sum(dtype=torch.float64)

    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, not copies, to be summed over ranks in place."""
        return [self.tokens, self.sums, self.products, self.owed_sums, self.owed_products, self.owed_squares]

    @classmethod
    def merged(cls, parts: Sequence["OwedMoments"]) -> "OwedMoments":
        """Returns the moments of all parts."""
        rows, columns = parts[0].owed_products.shape
        every = cls(rows, columns, parts[0].tokens.device)
        for sums, *own in zip(every.tensors(), *(part.tensors() for part in parts), strict=True):
            for one in own:
                sums += one
        return every

    @property
    def centre(self) -> tuple[Tensor, Tensor]:
        """The means of x and d, `[in_features]` and `[out_features]`."""
        return self.sums / self.tokens, self.owed_sums / self.tokens

    def about(self, centre: tuple[Tensor, Tensor] | None = None) -> "SecondMoments":
        """Computes the means of (x - c) (x - c)^T, (d - e) (x - c)^T and |d - e|^2 about a centre (c, e), zero if None."""
        inputs, owed, squares = (sums / self.tokens for sums in (self.products, self.owed_products, self.owed_squares))
        if centre is not None:
            (c, e), (x, d) = centre, self.centre
            inputs = inputs - torch.outer(x, c) - torch.outer(c, x) + torch.outer(c, c)
            owed = owed - torch.outer(d, c) - torch.outer(e, x) + torch.outer(e, c)
            squares = squares - 2 * e @ d + e @ e
        return SecondMoments(inputs, owed, squares)


class SecondMoments(NamedTuple):
    """Means of x x^T, `[in_features, in_features]`, H; of d x^T, `[out_features, in_features]`; and of |d|^2, `[]`."""

    inputs: Tensor
    owed: Tensor
    owed_squares: Tensor

    def error(self, missing: Tensor) -> float:
        """Computes E |M x + d|^2 = tr(M H M^T) + 2 tr(M (E d x^T)^T) + E |d|^2, M being the weights that are missing."""
        return float(((missing @ self.inputs + 2 * self.owed) * missing).sum() + self.owed_squares)


Fold = tuple[OwedMoments, OwedMoments]
"""Data that a ridge is tried on: what is fitted, and what is held out."""


def folds_of(parts: Sequence[OwedMoments], held_out: Sequence[int]) -> list[Fold]:
    """Returns the data that a ridge is tried on: each of some parts held out in turn, where it and the others have tokens."""
    others = {number: [own for place, own in enumerate(parts) if place != number and own.tokens] for number in held_out}
    return [(OwedMoments.merged(own), parts[number]) for number, own in others.items() if own and parts[number].tokens]


def wide(tensor: Tensor) -> Tensor:
    """Converts to float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _flat(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]) if keep is None else tensor.detach()[keep]


def solve_ridge(weight: Tensor, keep: Tensor, second: SecondMoments, ridge: float) -> Tensor | None:
    """Solves for the weights that do best from the kept inputs: W' = argmin E ||W x + d - W' x||^2 + ridge, float64.

    With S the inputs that are kept, R those removed, H the second moments of the inputs and D the diagonal of H_SS:
    W'_S = W_S + (W_R H_RS + E d x_S^T) (H_SS + ridge D)^-1, W'_R = 0, the minimum of
    E ||W x + d - W'_S x_S||^2 + ridge ||(W'_S - W_S) D^1/2||^2. An infinite ridge leaves W'_S at W_S. Where a bias makes up
    for the means, the second moments, float64, are about those. None if the ridge is too small for moments that rounding has left
    without an inverse.
    """
    new = torch.where(keep, weight.double(), 0)
    if ridge == math.inf or not second.inputs.diagonal()[keep].any():
        return new
    inner = second.inputs[keep][:, keep]
    diagonal = inner.diagonal()
    inner.diagonal().add_(ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum())
    lost = weight[:, ~keep].double() @ second.inputs[~keep][:, keep] + second.owed[:, keep]
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        return None
    new[:, keep] += torch.cholesky_solve(lost.t(), factor).t()
    return new


def choose_ridge(
    weight: Tensor, keep: Tensor, folds: Sequence[tuple[SecondMoments, SecondMoments]], ridges: Sequence[float]
) -> float:
    """Chooses the ridge with which solutions err least on held-out data, about the same means; infinity if none helps.

    The error of each fold counts as a share of the one without a refit. Ridges that have no solution are skipped.
    """
    cut = weight.double() * ~keep
    without = [max(held_out.error(cut), torch.finfo(torch.float64).tiny) for _, held_out in folds]
    errors = {math.inf: 1.0}
    for ridge in ridges:
        found = [solve_ridge(weight, keep, second, ridge) for second, _ in folds]
        if all(new is not None for new in found):
            left = [
                held_out.error(weight.double() - new) for new, (_, held_out) in zip(found, folds, strict=True) if new is not None
            ]
            errors[ridge] = sum(error / whole for error, whole in zip(left, without, strict=True)) / len(folds)
    return min(errors, key=lambda ridge: errors[ridge])


def refit_linear(
    weight: Tensor, bias: Tensor | None, keep: Tensor, folds: Sequence[Fold], every: OwedMoments, ridges: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """Refits a linear's weight and bias, float64: chooses the ridge on held-out data, and solves on all.

    A bias makes up for the mean of what is missing, b' = b + (W - W') E x + E d, and the weight for the rest. Where all data has
    no solution with that ridge, the next larger one takes its place.
    """
    centres = [None if bias is None else fit.centre for fit, _ in folds]
    seen = [(fit.about(c), held_out.about(c)) for (fit, held_out), c in zip(folds, centres, strict=True)]
    ridge = choose_ridge(weight, keep, seen, ridges)
    second = every.about(None if bias is None else every.centre)
    larger = sorted({ridge, math.inf, *(one for one in ridges if one > ridge)})
    new = next(found for one in larger if (found := solve_ridge(weight, keep, second, one)) is not None)
    if bias is None:
        return new, None
    mean, owed = every.centre
    return new, bias.double() + (weight.double() - new) @ mean + owed
