"""Least squares of what reads a pruned input: from moments of the inputs to the weights that make up best for what goes.

The closed form is that of ZipLM (2302.04089) and OSSCAR (2403.12983), with a ridge towards the old weights in the place of one
towards zero, chosen on held-out data.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1024
"""How many tokens are multiplied at a time."""


class Moments:
    """First and second moments of what a linear is given, float64.

    Args:
        in_features: The width of its inputs.
        device: Where the sums are kept, and where the inputs will be.

    Attributes:
        tokens: How many tokens were added, `[]`.
        sums: The sum of their inputs, `[in_features]`.
        products: The sum of their outer products, `[in_features, in_features]`.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Adds what a linear is given in one call.

        Args:
            inputs: `[..., in_features]`, of any floating dtype; multiplied in float32, float64 as it is.
            keep: Which tokens count, bool, `[...]`; all if None.
        """
        inputs = inputs.detach()
        for chunk in torch.split(inputs.reshape(-1, len(self.sums)) if keep is None else inputs[keep], CHUNK):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            self.tokens += len(wide)
            self.sums += wide.sum(0, dtype=torch.float64)
            self.products += wide.t() @ wide

    def tensors(self) -> list[Tensor]:
        """The sums themselves, not copies: what is summed over ranks, in place."""
        return [self.tokens, self.sums, self.products]

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both."""
        both = Moments(len(self.sums), self.sums.device)
        for sums, one, two in zip(both.tensors(), self.tensors(), other.tensors(), strict=True):
            torch.add(one, two, out=sums)
        return both

    @property
    def mean(self) -> Tensor:
        """The mean of the inputs, `[in_features]`."""
        return self.sums / self.tokens

    def about(self, centre: Tensor | None = None) -> Tensor:
        """The mean of (x - c) (x - c)^T, `[in_features, in_features]`.

        Args:
            centre: c, `[in_features]`; zero if None.
        """
        second = self.products / self.tokens
        if centre is None:
            return second
        crossed = torch.outer(self.mean, centre)
        return second.sub_(crossed).sub_(crossed.t()).add_(torch.outer(centre, centre))


def refit(weight: Tensor, keep: Tensor, second: Tensor, ridge: float) -> Tensor:
    """The weights that give a linear's outputs best from the inputs that stay, W' = argmin E ||(W - W') x||^2 + ridge.

    With S what stays, R what goes, H the second moments and D the diagonal of H_SS:
    W'_S = W_S + W_R H_RS (H_SS + ridge D)^-1, W'_R = 0, the minimum of E ||W x - W'_S x_S||^2 + ridge ||(W'_S - W_S) D^1/2||^2.

    Args:
        weight: W, `[out_features, in_features]`.
        keep: Which inputs stay, bool, `[in_features]`.
        second: H, the second moments of the inputs; about their mean where a bias makes up for that. float64,
            `[in_features, in_features]`.
        ridge: How strongly W'_S is held at W_S; infinity leaves it there.

    Returns:
        W', float64.
    """
    new = torch.where(keep, weight.double(), 0)
    if ridge == math.inf or not second.diagonal()[keep].any():
        return new
    inner = second[keep][:, keep]
    diagonal = inner.diagonal()
    inner.diagonal().add_(ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum())
    lost = weight[:, ~keep].double() @ second[~keep][:, keep]
    new[:, keep] += torch.cholesky_solve(lost.t(), torch.linalg.cholesky(inner)).t()
    return new


def choose_ridge(weight: Tensor, keep: Tensor, second: Tensor, held_out: Tensor, ridges: Sequence[float]) -> float:
    """The ridge with which the refit errs least on held-out data, tr((W - W') H (W - W')^T); infinity if none helps.

    Args:
        weight: As in `refit`.
        keep: As in `refit`.
        second: As in `refit`.
        held_out: H, the second moments of held-out inputs, about the same centre.
        ridges: The candidates.
    """
    errors = {}
    for ridge in (*ridges, math.inf):
        missing = weight.double() - refit(weight, keep, second, ridge)
        errors[ridge] = float(((missing @ held_out) * missing).sum())
    return min(reversed(errors), key=lambda ridge: errors[ridge])


def refit_linear(
    weight: Tensor, bias: Tensor | None, keep: Tensor, fit: Moments, held_out: Moments, ridges: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """A linear's new weight and bias: the ridge from held-out data, and then a refit on all.

    A bias makes up for the mean of what is missing, b' = b + (W - W') E x, and the weight is then for the rest.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]`, or None.
        keep: Which inputs stay, bool, `[in_features]`.
        fit: Moments of the inputs.
        held_out: Moments of other inputs.
        ridges: The candidates.

    Returns:
        Both, float64.
    """
    centre = None if bias is None else fit.mean
    ridge = choose_ridge(weight, keep, fit.about(centre), held_out.about(centre), ridges)
    both = fit.merged(held_out)
    new = refit(weight, keep, both.about(None if bias is None else both.mean), ridge)
    return new, None if bias is None else bias.double() + (weight.double() - new) @ both.mean
