"""Convolutions under criteria: statistics of the patches that they read, and groups of channels, each with its own."""

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from billhook.engine.statistics import InputNorms, Statistics
from billhook.model.convolutions import is_convolution, patches, places_of
from billhook.model.linears import size_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.masks import check_amount, parse_pattern, where_kept

VALUES = 2**24
"""How many values of patches are in memory at a time, unless one image has more."""


class Grouped:
    """Statistics of a grouped convolution: of each group those of its own channels, as each is a linear beside the others."""

    def __init__(self, parts: Sequence[Statistics]) -> None:
        self.parts = parts

    @property
    def tokens(self) -> Tensor:
        """How many patches were added."""
        return self.parts[0].tokens

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Adds patches, `[..., groups, in_features]`."""
        for part, own in zip(self.parts, inputs.unbind(-2), strict=True):
            part.add(own, keep)

    def settle(self) -> None:
        """Checks the sums of all groups a last time."""
        for part in self.parts:
            part.settle()

    def tensors(self) -> list[Tensor]:
        """Returns the sums of all groups."""
        return [tensor for part in self.parts for tensor in part.tensors()]


def empty_for(criterion: Criterion, linear: nn.Module, device: torch.device) -> Statistics | Grouped:
    """Makes the empty statistics of a linear's inputs; norms, for a criterion that needs none, tell at least who is called."""
    groups, width = linear.groups if is_convolution(linear) else 1, size_of(linear)[1]
    parts = [criterion.statistics(width, device) or InputNorms(width, device) for _ in range(groups)]
    return parts[0] if groups == 1 else Grouped(parts)


def add_patches(
    statistics: Statistics | Grouped, convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor, keep: Tensor | None
) -> None:
    """Adds what a convolution reads of `[batch, channels, *size]`, some images at a time.

    `keep`, bool, `[batch, *places]`, says which outputs count (None: all).
    """
    values = places_of(convolution, inputs)[1:].numel() * convolution.groups * size_of(convolution)[1]
    step = max(1, VALUES // max(1, values))
    counts = repeat(None) if keep is None else torch.split(keep, step)
    for images, counting in zip(torch.split(inputs, step), counts, strict=False):
        statistics.add(patches(convolution, images), counting)


def scores_of(criterion: Criterion, weight: Tensor, statistics: Statistics | Grouped | None) -> Tensor:
    """Scores a weight `[out_features, in_features]`; in groups, the outputs of each by its own inputs."""
    if not isinstance(statistics, Grouped):
        return criterion.score(weight, statistics)
    return torch.cat([criterion.score(own, part) for own, part in _parts(weight, statistics)])


def prune_by(
    criterion: Criterion, weight: Tensor, statistics: Statistics | Grouped | None, sparsity: float, pattern: str
) -> tuple[Tensor, Tensor]:
    """Prunes a weight by a criterion; returns the new weight and the keep-mask. See `Criterion.prune`.

    Scores of groups compete as the criterion says, over the whole layer or in each row. A criterion that updates weights solves
    each group as a layer of its own.
    """
    if not isinstance(statistics, Grouped):
        return criterion.prune(weight, statistics, sparsity, pattern)
    if criterion.updates:
        pruned = [criterion.prune(own, part, sparsity, pattern) for own, part in _parts(weight, statistics)]
        return torch.cat([new for new, _ in pruned]), torch.cat([keep for _, keep in pruned])
    check_finite(weight, "the weight")
    keep = criterion.keep(scores_of(criterion, weight, statistics), check_amount(sparsity, pattern), parse_pattern(pattern))
    return where_kept(weight, keep), keep


def _parts(weight: Tensor, statistics: Grouped) -> list[tuple[Tensor, Statistics]]:
    return list(zip(weight.chunk(len(statistics.parts)), statistics.parts, strict=True))
