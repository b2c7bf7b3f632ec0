"""Allocations: how the sparsity of the whole model is shared among its linear layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from billhook.arguments import check_fraction, check_number, check_types
from billhook.model.layers import size_of
from billhook.sparsity.criteria import Wanda
from billhook.sparsity.grouped import score_weight
from billhook.sparsity.masks import check_amount
from billhook.sparsity.visitor import PruningVisitor, Walks

HIGHEST = 0.99
"""The highest sparsity of a linear, unless that of the whole model is higher."""

Block = Mapping[str, int]
"""The number of weights of each linear of a block, by name."""


class Allocation(ABC):
    """How sparse each linear becomes.

    Attributes:
        measures: Whether `allocate` needs the results of `measure`, one for each block.
    """

    measures: ClassVar[bool] = False

    def measure(self, scores: Sequence[Tensor]) -> float:
        """Measures a block.

        Args:
            scores: Wanda's scores of each linear of the dense block, `[out_features, in_features]`.
        """
        return 0.0

    @abstractmethod
    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity of each linear by name, each in [0, 1).

        Args:
            blocks: The linears' sizes, block by block.
            sparsity: Of the model as a whole, in [0, 1).
            measured: The result of `measure` for each block.

        Raises:
            ValueError: If the sparsity is not legal, or `measured` is needed and has not one value a block.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity for each linear."""

    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity itself. See `Allocation.allocate`."""
        return dict.fromkeys((name for block in blocks for name in block), check_amount(sparsity))


@dataclass(frozen=True)
class ByPattern(Allocation):
    """A sparsity for linears of some names; those that no pattern matches get the sparsity of the whole.

    The sparsity of the whole is then the average of the parts, not the one asked for.

    Args:
        sparsities: By glob pattern, such as `"*.down_proj"` or `"model.layers.[0-3].*"`. The first that matches a name counts.

    Raises:
        ValueError: If there are none, or a sparsity is outside [0, 1).

    >>> ByPattern({"0.*": 0.0, "*.up": 0.75}).allocate([{"0.up": 8, "0.down": 8}, {"1.up": 8, "1.down": 8}], 0.5)
    {'0.up': 0.0, '0.down': 0.0, '1.up': 0.75, '1.down': 0.5}
    """

    sparsities: dict[str, float]

    def __post_init__(self) -> None:
        if not self.sparsities:
            raise ValueError("sparsities={} must have at least one pattern")
        for pattern, sparsity in self.sparsities.items():
            try:
                check_amount(sparsity)
            except ValueError as error:
                raise ValueError(f"sparsities[{pattern!r}]: {error}") from None

    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity of the first pattern that matches. See `Allocation.allocate`.

        Raises:
            ValueError: If a pattern matches no name.
        """
        check_amount(sparsity)
        names = [name for block in blocks for name in block]
        for pattern in self.sparsities:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"sparsities[{pattern!r}] matches none of the {len(names)} linears, such as {names[:3]}")
        return {name: next((s for p, s in self.sparsities.items() if fnmatchcase(name, p)), sparsity) for name in names}


@dataclass(frozen=True)
class OWL(Allocation):
    """Lower sparsity for blocks with more outliers; the same for all linears of a block.

    D_b is the percentage of a block's scores above `multiple` times their mean. D rescaled to [0, 2 lam] is subtracted from the
    sparsity, and centred, so that the average over all weights is the sparsity asked for. Values that would leave [0, 0.99] stop
    there, and the other blocks make up for it. From "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
    LLMs to High Sparsity", Yin et al., 2023, https://arxiv.org/abs/2310.05175, section 3.2.

    Args:
        lam: Half of the widest gap between blocks; the paper's lambda, which it tunes at each sparsity (0.08 at 70 %).
        multiple: How many times the mean makes an outlier; the paper's M.

    Raises:
        ValueError: If `lam` is outside [0, 0.5], or `multiple` is not positive.

    Example:
        >>> import torch
        >>> owl = OWL(lam=0.1)
        >>> few, many = owl.measure([torch.tensor([1.0] * 10)]), owl.measure([torch.tensor([1.0] * 9 + [20.0])])
        >>> {name: round(s, 2) for name, s in owl.allocate([{"0.up": 8}, {"1.up": 8}], 0.5, [few, many]).items()}
        {'0.up': 0.6, '1.up': 0.4}
    """

    measures: ClassVar[bool] = True
    lam: float = 0.08
    multiple: float = 5.0

    def __post_init__(self) -> None:
        check_types(OWL, vars(self))
        check_fraction("lam", self.lam, "[0, 0.5]")
        check_number("multiple", self.multiple, above=0)

    def measure(self, scores: Sequence[Tensor]) -> float:
        """Computes the percentage of outliers, D_b = 100 mean(S > multiple * mean(S)) over all scores of the block."""
        size = sum(s.numel() for s in scores)
        bound = self.multiple * sum(float(s.sum()) for s in scores) / size
        return 100 * sum(int((s > bound).sum()) for s in scores) / size

    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Lowers the sparsity where more outliers were measured. See `Allocation.allocate`."""
        sparsity = check_amount(sparsity)
        if len(measured) != len(blocks):
            raise ValueError(f"measured must have one value for each of {len(blocks)} blocks, got {len(measured)}")
        low, high = min(measured), max(measured)
        gaps = [2 * self.lam * (d - low) / (high - low) if high > low else 0.0 for d in measured]
        sizes = [sum(block.values()) for block in blocks]
        amounts = _centre([-gap for gap in gaps], sizes, sparsity)
        return {name: amount for block, amount in zip(blocks, amounts, strict=True) for name in block}


def _centre(values: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """Shifts all values by one number, and clamps them to 0 and `HIGHEST`, so that their mean weighted by size is as asked."""
    highest = max(HIGHEST, mean)
    low, high = -max(values), highest - min(values)
    for _ in range(100):
        shift = (low + high) / 2
        moved = [min(max(value + shift, 0.0), highest) for value in values]
        if sum(m * size for m, size in zip(moved, sizes, strict=True)) < mean * sum(sizes):
            low = shift
        else:
            high = shift
    return moved


def allocate_sparsities(walks: Walks, amount: float, allocation: Allocation) -> dict[str, float]:
    """Finds the sparsity of each linear; blocks that no batch reaches take no part in measuring."""
    blocks, measured = [site.linears for site in walks.blocks], dict[int, float]()
    if allocation.measures:
        visitor = walks("none", partial(_MeasuringVisitor, allocation))
        measured = walks.comm.decide(lambda: visitor.measured)  # floats of ranks may be rounded otherwise
        blocks = [blocks[number] for number in measured]
    sizes = [{name: math.prod(size_of(linear)) for name, linear in block.items()} for block in blocks]
    return dict.fromkeys(walks.linears, amount) | (allocation.allocate(sizes, amount, list(measured.values())) if sizes else {})


class _MeasuringVisitor(PruningVisitor):
    """A visitor that prunes nothing, and measures each block by Wanda's scores."""

    def __init__(self, allocation: Allocation, walks: Walks, shared: bool) -> None:
        super().__init__(Wanda(), {}, "unstructured", None, walks, shared)
        self.allocation, self.measured, self.blocks = allocation, dict[int, float](), walks.blocks

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Measures the blocks of linears."""
        for block, site in enumerate(self.blocks):
            scores = list[Tensor]()
            for name, linear in site.linears.items():
                if name in linears:
                    self.store.load(linear)
                    scores.append(score_weight(self.criterion, self.scored(name), self.statistics_of(name)))
            if scores:
                self.measured[block] = self.allocation.measure(scores)
