"""Criteria: how important each weight of a linear layer is, and pruning by that.

A weight that is zero has the lowest score by every criterion, so pruning again continues from where it was.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from billhook.arguments import check_number, check_one_of, check_types
from billhook.engine.statistics import InputNorms, Statistics
from billhook.linalg import safe_divisor
from billhook.sparsity.masks import check_amount, check_width, keep_layer, keep_n_of_m, keep_rows, parse_pattern, where_kept

Comparison = Literal["row", "layer", "global"]
"""Which weights compete: those of one output (a row of the weight), those of the whole layer, or those of all layers."""

ROWS = 256
"""Rows that are sorted at a time, where something has to be sorted."""

S = TypeVar("S", bound=Statistics)


class Criterion(ABC):
    """How important each weight of a linear layer is. Weights are `[out_features, in_features]`.

    Attributes:
        compares: Which weights compete; patterns N:M compare within each group of M instead.
        needs: The kind of statistics of a layer's inputs that are needed; None if none are.
        updates: Whether pruning changes weights that it keeps, too.
        copies: How often the statistics' size is taken at most: as they are, and what is computed of them.
    """

    compares: Comparison
    needs: ClassVar[type[Statistics] | None] = None
    updates: ClassVar[bool] = False
    copies: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_one_of("compares", self.compares, Comparison)

    def statistics(self, in_features: int, device: torch.device | str = "cpu") -> Statistics | None:
        """Makes empty statistics of a layer's inputs; None if none are needed."""
        return None if self.needs is None else self.needs(in_features, device)

    @abstractmethod
    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes the scores, float32, `[out_features, in_features]`; higher = more important.

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
            sparsity: Fraction that becomes zero, in [0, 1); None with a pattern N:M, which implies it.
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
        return self.solve(weight, statistics, sparsity, kept)

    def solve(
        self, weight: Tensor, statistics: Statistics | None, sparsity: float, kept: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Does what `prune` does, whose arguments are legal: by default all kept weights stay as they are."""
        keep = self.keep(self.score(weight, statistics), sparsity, kept)
        return where_kept(weight, keep), keep

    def keep(self, scores: Tensor, sparsity: float, kept: tuple[int, int] | None, check: bool = True) -> Tensor:
        """Returns the keep-mask of the highest scores: N of every M, with (N, M) = `kept`, or of those that compete.

        NaN is refused, unless `check=False`, which asks the device for nothing.
        """
        if kept is not None:
            return keep_n_of_m(scores, *kept, check)
        return keep_rows(scores, sparsity, check) if self.compares == "row" else keep_layer(scores, sparsity, check)

    def _of_inputs(self, statistics: Statistics | None, weight: Tensor, kind: type[S]) -> S:
        """Returns the statistics, if they are of the kind that is needed, and of this weight's inputs."""
        if not isinstance(statistics, kind):
            given = "none" if statistics is None else type(statistics).__name__
            raise ValueError(f"{type(self).__name__} needs {kind.__name__} of the layer's inputs (calibration data), got {given}")
        if statistics.in_features != weight.shape[1]:
            raise ValueError(f"statistics of {statistics.in_features} input features do not suit a weight of {weight.shape[1]}")
        statistics.check()
        return statistics


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
        """Draws scores uniform in (0, 1], and 0 where the weight is zero."""
        # the weight itself takes part in the seed: linears of one size must not all get one mask
        first_row = weight.detach()[0].float().contiguous().view(torch.int32)
        seed = (self.seed * 1_000_003 + int(first_row.sum(dtype=torch.int64))) % 2**63
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        return (1 - drawn).to(weight.device).masked_fill_(weight.detach() == 0, 0)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """S_ij = |W_ij|, compared within the whole layer: the baseline of Wanda's paper, section 4.

    Args:
        compares: Which weights compete.

    Example:
        >>> Magnitude().prune(torch.tensor([[1.0, -2.0], [3.0, -4.0]]), sparsity=0.5)[0]
        tensor([[ 0.,  0.],
                [ 3., -4.]])
    """

    compares: Comparison = "layer"

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij|."""
        return weight.detach().abs().float()


@dataclass(frozen=True)
class Wanda(Criterion):
    """S_ij = |W_ij| ||X_j||, compared within each output (equation 1 and algorithm 1).

    From "A Simple and Effective Pruning Approach for Large Language Models", Sun, Liu, Bair & Kolter, 2023,
    https://arxiv.org/abs/2306.11695. The weights of an input that was always zero score zero.

    Args:
        compares: Which weights compete.

    Example:
        >>> norms = Wanda().statistics(in_features=2)
        >>> norms.add(torch.tensor([[1.0, 0.1], [1.0, 0.1]]))
        >>> Wanda().prune(torch.tensor([[1.0, -2.0], [3.0, -4.0]]), norms, sparsity=0.5)[0]
        tensor([[1., 0.],
                [3., 0.]])
    """

    compares: Comparison = "row"
    needs: ClassVar[type[Statistics] | None] = InputNorms

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes |W_ij| ||X_j||."""
        norms = self._of_inputs(statistics, weight, Statistics).squares.sqrt()
        return weight.detach().abs().float().mul_(norms)


@dataclass(frozen=True)
class WandaAlpha(Wanda):
    """Wanda's variant (its appendix): of each row, the lowest scores that add up to a share alpha of its sum are removed.

    With the scores of row i in ascending order, those with S_i(1) + ... + S_i(k) <= alpha (S_i(1) + ... + S_i(n)) are removed.
    The paper bisects for the alpha, one for all rows, that gives the sparsity to within 0.001. Here each score is its own share,
    the left sum over the right one, so comparing these within the layer finds that alpha exactly.
    """

    compares: Comparison = field(default="layer", init=False, repr=False)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes the share of its row's sum that a score and the lower ones add up to."""
        scores = super().score(weight, statistics)
        for row in torch.split(scores, ROWS):
            ascending, order = row.sort(dim=1, stable=True)
            sums = ascending.cumsum(1)
            row.scatter_(1, order, sums / safe_divisor(sums[:, -1:]))
        return scores


@dataclass(frozen=True)
class RIA(Criterion):
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a (relative importance and activations).

    From "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", Zhang, Bai, Lin, Zhao, Hou &
    Cannistraci, ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF. Its permutation of channels for N:M is `permute_for`.

    Args:
        exponent: a, of the inputs' norms.
        compares: Which weights compete: by the authors' code `"layer"` unless `"row"` is asked for.

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
    needs: ClassVar[type[Statistics] | None] = InputNorms

    def __post_init__(self) -> None:
        check_types(RIA, vars(self))
        super().__post_init__()
        check_number("exponent", self.exponent, least=0)

    def score(self, weight: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Computes (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a."""
        norms = self._of_inputs(statistics, weight, Statistics).squares.sqrt()
        size = weight.detach().abs().float()
        relative = size / safe_divisor(size.sum(0)) + size / safe_divisor(size.sum(1, keepdim=True))
        return relative.mul_(norms**self.exponent)


def check_finite(values: Tensor, what: str) -> None:
    """Refuses NaN and inf."""
    if not torch.stack(values.detach().aminmax()).isfinite().all():
        raise ValueError(f"{what} holds NaN or inf")
