"""Pruning criteria: scores of the weights of a linear layer, and pruning by them.

Zero weights always have the lowest score, so pruning again continues from an earlier result.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from billhook.arguments import check_number, check_one_of, check_types
from billhook.engine import InputNorms, Statistics
from billhook.linalg import safe_divisor
from billhook.sparsity.masks import check_amount, check_width, keep_layer, keep_n_of_m, keep_rows, parse_pattern, where_kept

Comparison = Literal["row", "layer", "global"]
"""Comparison group: weights of an output (`"row"`), of a layer, or of all layers (`"global"`)."""

ROWS = 256
"""Rows that are sorted at once."""

S = TypeVar("S", bound=Statistics)


class Criterion(ABC):
    """Scores the weights of a linear layer, `[out_features, in_features]`.

    Attributes:
        compares: Comparison group. N:M patterns compare within each group of M instead.
        needs: Type of input statistics; None if the criterion needs no data.
        updates: Whether pruning also changes the kept weights.
        copies: Peak memory of pruning, as a multiple of the size of the statistics.
    """

    compares: Comparison
    needs: ClassVar[type[Statistics] | None] = None
    updates = False
    copies = 4

    def __post_init__(self) -> None:
        check_one_of("compares", self.compares, Comparison)

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics | None:
        """Makes empty statistics of a layer's inputs; None if the criterion needs no data."""
        return None if self.needs is None else self.needs(in_features, device)

    @abstractmethod
    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes scores, float32, `[out_features, in_features]`; the lowest are pruned first.

        Raises:
            ValueError: If the statistics are missing, or not of this weight's inputs.
        """

    def prune(
        self, weight: Tensor, statistics: Statistics | None = None, sparsity: float | None = None, pattern: str = "unstructured"
    ) -> tuple[Tensor, Tensor]:
        """Zeroes the lowest scores of a layer and returns the new weight; the input is unchanged.

        Args:
            weight: Weight `[out_features, in_features]`, of any floating-point dtype.
            statistics: Statistics of the layer's inputs, from `statistics()`; None if there are none.
            sparsity: Fraction of the weights to zero, in [0, 1). None with an N:M pattern, which implies it.
            pattern: `"unstructured"`, or `"N:M"` to keep N of every M consecutive inputs.

        Returns:
            The new weight, in the dtype of the old, and the mask, bool; both `[out_features, in_features]`.

        Raises:
            ValueError: If sparsity or pattern is not legal or does not fit the weight, the weight or the statistics contain NaN
                or inf, or the statistics are missing or of other inputs.
        """
        sparsity, kept = check_amount(sparsity, pattern), parse_pattern(pattern)
        check_width(weight.shape[1], pattern)
        check_finite(weight, "the weight")
        return self.solve(weight, statistics, sparsity, kept)

    def solve(
        self, weight: Tensor, statistics: Statistics | None, sparsity: float, kept: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Does the work of `prune` after its checks. By default the kept weights do not change.

        Args:
            weight: The weight, `[out_features, in_features]`.
            statistics: Statistics of its inputs, if the criterion needs them.
            sparsity: Fraction of weights to zero.
            kept: (N, M) of an N:M pattern. None for unstructured.
        """
        keep = self.keep(self.score(weight, statistics), sparsity, kept)
        return where_kept(weight, keep), keep

    def keep(self, scores: Tensor, sparsity: float, kept: tuple[int, int] | None) -> Tensor:
        """Returns the mask of the highest scores, per comparison group or N of every M.

        Args:
            scores: The scores, `[out_features, in_features]`.
            sparsity: Fraction of weights to zero.
            kept: (N, M) of an N:M pattern. None for unstructured.
        """
        if kept is not None:
            return keep_n_of_m(scores, *kept)
        return keep_rows(scores, sparsity) if self.compares == "row" else keep_layer(scores, sparsity)

    def _of_inputs(self, statistics: Statistics | None, weight: Tensor, kind: type[S]) -> S:
        """Returns the statistics if their type and size fit; raises otherwise."""
        if not isinstance(statistics, kind):
            got = "none" if statistics is None else type(statistics).__name__
            raise ValueError(f"{type(self).__name__} needs {kind.__name__} of the layer's inputs (calibration data), got {got}.")
        if statistics.in_features != weight.shape[1]:
            raise ValueError(f"statistics of {statistics.in_features} input features do not fit a weight of {weight.shape[1]}.")
        statistics.check()
        return statistics


@dataclass(frozen=True)
class Random(Criterion):
    """Random scores, fixed by the seed and the weight.

    Args:
        seed: Random seed.
        compares: Comparison group.
    """

    seed: int = 0
    compares: Comparison = "layer"

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Returns uniform scores in (0, 1], 0 for zero weights, `[out_features, in_features]`."""
        # the weight is part of the seed: layers of equal size must get different masks
        first_row = weight.detach()[0].float().contiguous().view(torch.int32)
        seed = (self.seed * 1_000_003 + int(first_row.sum(dtype=torch.int64))) % 2**63
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        return (1 - drawn).to(weight.device).masked_fill_(weight.detach() == 0, 0)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """S_ij = |W_ij|, compared within the layer: the baseline of Wanda's paper, section 4.

    Args:
        compares: Comparison group.

    Example:
        >>> Magnitude().prune(torch.tensor([[1.0, -2.0], [3.0, -4.0]]), sparsity=0.5)[0]
        tensor([[ 0.,  0.],
                [ 3., -4.]])
    """

    compares: Comparison = "layer"

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij|, float32, `[out_features, in_features]`."""
        return weight.detach().abs().float()


@dataclass(frozen=True)
class Wanda(Criterion):
    """S_ij = |W_ij| ||X_j||, compared within each output (equation 1 and algorithm 1).

    From "A Simple and Effective Pruning Approach for Large Language Models", Sun, Liu, Bair & Kolter, 2023,
    https://arxiv.org/abs/2306.11695. Weights of an input that is always zero score zero.

    Args:
        compares: Comparison group.

    Example:
        >>> norms = Wanda().statistics(in_features=2)
        >>> norms.add(torch.tensor([[1.0, 0.1], [1.0, 0.1]]))
        >>> Wanda().prune(torch.tensor([[1.0, -2.0], [3.0, -4.0]]), norms, sparsity=0.5)[0]
        tensor([[1., 0.],
                [3., 0.]])
    """

    compares: Comparison = "row"
    needs = InputNorms

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij| ||X_j||, float32, `[out_features, in_features]`."""
        norms = self._of_inputs(statistics, weight, Statistics).squares.sqrt()
        return weight.detach().abs().float().mul_(norms)


@dataclass(frozen=True)
class WandaAlpha(Wanda):
    """Wanda's variant that removes the same share alpha of each row's sum (appendix).

    With the scores of row i in ascending order, the weights with S_i(1) + ... + S_i(k) <= alpha (S_i(1) + ... + S_i(n)) are
    removed. The paper bisects for the alpha, equal for all rows, that gives the sparsity to within 0.001. Here each score
    becomes its own share, the left sum over the right sum, so a comparison within the layer finds that alpha exactly.
    """

    compares: Comparison = field(default="layer", init=False, repr=False)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes the cumulative share of each score in the sum of its row."""
        scores = super().score(weight, statistics)
        for row in torch.split(scores, ROWS):
            ascending, order = row.sort(dim=1, stable=True)
            sums = ascending.cumsum(1)
            row.scatter_(1, order, sums / safe_divisor(sums[:, -1:]))
        return scores


@dataclass(frozen=True)
class RIA(Criterion):
    """Relative importance and activations: (|W_ij| / row sum + |W_ij| / column sum) ||X_j||^a.

    S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a. From "Plug-and-Play: An Efficient Post-training Pruning
    Method for Large Language Models", Zhang, Bai, Lin, Zhao, Hou & Cannistraci, ICLR 2024,
    https://openreview.net/forum?id=Tr0lPx9woF.

    Args:
        exponent: Exponent a of the input norms.
        compares: Comparison group. Defaults to `"layer"`, as in the authors' code.

    Raises:
        ValueError: If the exponent is negative.

    Example:
        >>> norms = RIA().statistics(in_features=2)
        >>> norms.add(torch.ones(1, 2))
        >>> RIA().score(torch.tensor([[1.0, -1.0], [3.0, -1.0]]), norms)
        tensor([[0.7500, 1.0000],
                [1.5000, 0.7500]])
    """

    exponent: float = 0.5
    compares: Comparison = "layer"
    needs = InputNorms

    def __post_init__(self) -> None:
        check_types(RIA, vars(self))
        super().__post_init__()
        check_number("exponent", self.exponent, least=0)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a, `[out, in]`."""
        norms = self._of_inputs(statistics, weight, Statistics).squares.sqrt()
        size = weight.detach().abs().float()
        relative = size / safe_divisor(size.sum(0)) + size / safe_divisor(size.sum(1, keepdim=True))
        return relative.mul_(norms**self.exponent)


def check_finite(values: Tensor, name: str) -> None:
    """Raises if values, `[...]`, contain NaN or inf."""
    if not torch.stack(values.detach().aminmax()).isfinite().all():
        raise ValueError(f"{name} contains NaN or inf.")
