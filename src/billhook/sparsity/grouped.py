"""Criteria for grouped convolutions, which are several independent linear layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from billhook.engine import InputNorms, Statistics
from billhook.model import is_convolution, size_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.masks import check_amount, parse_pattern, where_kept


class GroupedStatistics:
    """Statistics of a grouped convolution, separate for the channels of each group."""

    def __init__(self, parts: Sequence[Statistics]) -> None:
        self.parts = parts

    @property
    def tokens(self) -> Tensor:
        """Number of patches."""
        return self.parts[0].tokens

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Adds patches, `[..., groups, in_features]`."""
        for part, inputs_of_group in zip(self.parts, inputs.unbind(-2), strict=True):
            part.add(inputs_of_group, keep)

    def tensors(self) -> list[Tensor]:
        """Returns the sums of all groups."""
        return [tensor for part in self.parts for tensor in part.tensors()]


def empty_statistics(criterion: Criterion, linear: nn.Module, device: torch.device) -> Statistics | GroupedStatistics:
    """Makes empty statistics of a layer's inputs; norms if the criterion needs none."""
    groups, width = linear.groups if is_convolution(linear) else 1, size_of(linear)[1]
    parts = [criterion.statistics(width, device) or InputNorms(width, device) for _ in range(groups)]
    return parts[0] if groups == 1 else GroupedStatistics(parts)


def score_weight(criterion: Criterion, weight: Tensor, statistics: Statistics | GroupedStatistics | None) -> Tensor:
    """Scores a weight `[out_features, in_features]`; each group by its own inputs."""
    if not isinstance(statistics, GroupedStatistics):
        return criterion.score(weight, statistics)
    return torch.cat([criterion.score(*group) for group in _groups(weight, statistics)])


def prune_weight(
    criterion: Criterion, weight: Tensor, statistics: Statistics | GroupedStatistics | None, sparsity: float, pattern: str
) -> tuple[Tensor, Tensor]:
    """Prunes a weight with a criterion; returns new weight and mask. See `Criterion.prune`.

    The comparison group of the criterion applies across convolution groups. A criterion that updates weights solves each group
    separately.
    """
    if not isinstance(statistics, GroupedStatistics):
        return criterion.prune(weight, statistics, sparsity, pattern)
    if criterion.updates:
        weights, masks = zip(*(criterion.prune(*group, sparsity, pattern) for group in _groups(weight, statistics)), strict=True)
        return torch.cat(weights), torch.cat(masks)
    check_finite(weight, "the weight")
    keep = criterion.keep(score_weight(criterion, weight, statistics), check_amount(sparsity, pattern), parse_pattern(pattern))
    return where_kept(weight, keep), keep


def _groups(weight: Tensor, statistics: GroupedStatistics) -> Iterator[tuple[Tensor, Statistics]]:
    return zip(weight.chunk(len(statistics.parts)), statistics.parts, strict=True)


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Prefixes the errors of a criterion with the name of the layer.

    Raises:
        ValueError: If the criterion raises it.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
