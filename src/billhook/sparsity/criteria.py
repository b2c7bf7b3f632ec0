"""Criteria: how important each weight of a linear layer is, and what pruning by that gives.

A criterion is a set of immutable settings. It says which statistics of the layer's inputs it needs, scores a weight by them, and
prunes it. A weight that is zero has the lowest score by every criterion, so pruning again goes on from where it was.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from billhook.sparsity.masks import check_amount, check_width, keep_layer, keep_n_of_m, keep_rows, parse_pattern, where_kept
from billhook.sparsity.statistics import InputNorms, Statistics

Comparison = Literal["row", "layer", "global"]
"""Which weights compete: those of one output (a row of the weight), those of the whole layer, or those of all layers."""


ROWS = 256
"""Rows that are sorted at a time, where something has to be sorted."""

S = TypeVar("S", bound=Statistics)


class Criterion(ABC):
    """How important each weight of a linear layer is. Weights are `[out_features, in_features]`.

    Attributes:
        compares: Which weights compete; patterns N:M compare within each group of M instead.
        updates: Whether pruning changes weights that it keeps, too.
    """

    compares: Comparison
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.compares not in get_args(Comparison):
            raise ValueError(f"compares={self.compares!r} must be one of {get_args(Comparison)}")

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics | None:
        """Empty statistics of what must be known of a layer's inputs; None if nothing."""
        return None

    @abstractmethod
    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The scores, float32, `[out_features, in_features]`; higher = more important.

        Raises:
            ValueError: If the statistics are missing, or not of this weight's inputs.
        """

    def prune(
        self, weight: Tensor, statistics: Statistics | None = None, sparsity: float | None = None, pattern: str = "unstructured"
    ) -> tuple[Tensor, Tensor]:
        """Zeroes the lowest scores of one layer. The weight given is not changed.

        Args:
            weight: `[out_features, in_features]`, of any floating dtype.
            statistics: Of the layer's inputs, as `statistics()` made them; None where it makes none.
            sparsity: Fraction that becomes zero, in [0, 1); None with a pattern N:M, which says it.
            pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive input features.

        Returns:
            The new weight, in the dtype of the old, and the keep-mask, bool; both `[out_features, in_features]`.

        Raises:
            ValueError: If sparsity or pattern are not legal or do not suit the weight, the weight or the statistics hold NaN or
                inf, or the statistics are missing or not of this weight's inputs.
        """
        sparsity, kept = check_amount(sparsity, pattern), parse_pattern(pattern)
        check_width(weight.shape[1], pattern)
        check_finite(weight, "the weight")
        scores = self.score(weight, statistics)
        if kept is not None:
            keep = keep_n_of_m(scores, *kept)
        else:
            keep = keep_rows(scores, sparsity) if self.compares == "row" else keep_layer(scores, sparsity)
        return where_kept(weight, keep), keep


@dataclass(frozen=True)
class Random(Criterion):
    """Random scores: others for another weight, the same ones whenever seed and weight are the same.

    Args:
        seed: Of the random numbers.
        compares: Which weights compete.
    """

    seed: int = 0
    compares: Comparison = "layer"

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Uniform in (0, 1], and 0 where the weight is zero."""
        # the weight itself takes part in the seed: linears of one size must not all get one mask
        first_row = weight.detach()[0].float().contiguous().view(torch.int32)
        seed = (self.seed * 1_000_003 + int(first_row.sum(dtype=torch.int64))) % 2**63
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        return (1 - drawn).to(weight.device).masked_fill_(weight.detach() == 0, 0)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """S_ij = |W_ij|, compared within the whole layer (the baseline of 2306.11695, section 4).

    Args:
        compares: Which weights compete.
    """

    compares: Comparison = "layer"

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """|W_ij|."""
        return weight.detach().abs().float()


@dataclass(frozen=True)
class Wanda(Criterion):
    """S_ij = |W_ij| ||X_j||, compared within each output (2306.11695, equation 1 and algorithm 1).

    The weights of an input that was always zero score zero.

    Args:
        compares: Which weights compete.
    """

    compares: Comparison = "row"

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics:
        """Empty norms of the inputs."""
        return InputNorms(in_features, device)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """|W_ij| ||X_j||."""
        norms = _seen(statistics, weight, self, Statistics).squares.sqrt()
        return weight.detach().abs().float().mul_(norms)


@dataclass(frozen=True)
class WandaAlpha(Wanda):
    """Wanda's variant: a row loses what its lowest scores add up to a share alpha of its sum (2306.11695, appendix).

    With the scores of row i in ascending order, those with S_i(1) + ... + S_i(k) <= alpha (S_i(1) + ... + S_i(n)) go. The paper
    bisects for the alpha, one for all rows, that gives the sparsity to within 0.001. Here each score is its own share, the left
    sum over the right one, so comparing these within the layer finds that alpha exactly.
    """

    compares: Comparison = field(default="layer", init=False, repr=False)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The share of its row's sum that a score and the lower ones add up to."""
        scores = super().score(weight, statistics)
        for row in torch.split(scores, ROWS):
            ascending, order = row.sort(dim=1, stable=True)
            sums = ascending.cumsum(1)
            row.scatter_(1, order, sums / _nonzero(sums[:, -1:]))
        return scores


@dataclass(frozen=True)
class RIA(Criterion):
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a (relative importance and activations).

    From "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", Zhang et al., ICLR 2024. Its
    permutation of channels for N:M is not part of it here.

    Args:
        exponent: a, of the inputs' norms.
        compares: Which weights compete: by the authors' code `"layer"` unless `"row"` is asked for.

    Raises:
        ValueError: If the exponent is negative.
    """

    exponent: float = 0.5
    compares: Comparison = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent={self.exponent} must be a number of at least 0")

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics:
        """Empty norms of the inputs."""
        return InputNorms(in_features, device)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a."""
        norms = _seen(statistics, weight, self, Statistics).squares.sqrt()
        size = weight.detach().abs().float()
        relative = size / _nonzero(size.sum(0)) + size / _nonzero(size.sum(1, keepdim=True))
        return relative.mul_(norms**self.exponent)


def _seen(statistics: Statistics | None, weight: Tensor, criterion: Criterion, kind: type[S]) -> S:
    """The statistics, if they are what the criterion needs for this weight."""
    if not isinstance(statistics, kind):
        given = "none" if statistics is None else type(statistics).__name__
        raise ValueError(
            f"{type(criterion).__name__} needs {kind.__name__} of the layer's inputs (calibration data), got {given}"
        )
    if statistics.in_features != weight.shape[1]:
        raise ValueError(f"statistics of {statistics.in_features} input features do not suit a weight of {weight.shape[1]}")
    statistics.check()
    return statistics


def check_finite(values: Tensor, what: str) -> None:
    """Refuses NaN and inf.

    Raises:
        ValueError: If there is any, with what the values are.
    """
    lowest, highest = values.detach().aminmax()
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise ValueError(f"{what} holds NaN or inf")


def _nonzero(sums: Tensor) -> Tensor:
    """Divisors: what is zero over zero is to be zero."""
    return torch.where(sums > 0, sums, 1)
