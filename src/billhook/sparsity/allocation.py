"""Sparsity allocation: how the total sparsity is distributed over linear layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import Tensor

from billhook.arguments import check_fraction, check_number, check_types
from billhook.engine import ModulesByName
from billhook.model import size_of
from billhook.sparsity.criteria import Wanda
from billhook.sparsity.masks import check_amount
from billhook.sparsity.visitor import PruningVisitor, WalkSettings

HIGHEST = 0.99
"""Maximum sparsity of a linear layer, unless that of the model is higher."""

LayerSizes = Mapping[str, int]
"""Number of weights of each linear layer of a block, by name."""


class Allocation(ABC):
    """Distributes the sparsity of a model over its linear layers.

    Attributes:
        measures: Whether `allocate` needs a result of `measure` for each block.
    """

    measures = False

    def measure(self, scores: Sequence[Tensor]) -> float:
        """Measures a block.

        Args:
            scores: Wanda scores of each linear layer of the dense block, `[out_features, in_features]`.
        """
        return 0.0

    @abstractmethod
    def allocate(self, blocks: Sequence[LayerSizes], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity of each linear layer by name, in [0, 1).

        Args:
            blocks: Sizes of the linear layers, by block.
            sparsity: Sparsity of the whole model, in [0, 1).
            measured: Result of `measure` for each block.

        Raises:
            ValueError: If the sparsity is not legal, or `measured` is needed and does not have a value for each block.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """Gives each linear layer the same sparsity."""

    def allocate(self, blocks: Sequence[LayerSizes], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity of the model for each layer. See `Allocation.allocate`."""
        return dict.fromkeys((name for block in blocks for name in block), check_amount(sparsity))


@dataclass(frozen=True)
class ByPattern(Allocation):
    """Sets a sparsity for layers whose names match a pattern, and the model's for all others.

    The sparsity of the model is then the average over its layers, and may differ from the requested value.

    Args:
        sparsities: Sparsity by glob pattern, such as `"*.down_proj"` or `"model.layers.[0-3].*"`. The first pattern that matches
            a name applies.

    Raises:
        ValueError: If there is no pattern, or a sparsity is outside [0, 1).

    >>> ByPattern({"0.*": 0.0, "*.up": 0.75}).allocate([{"0.up": 8, "0.down": 8}, {"1.up": 8, "1.down": 8}], 0.5)
    {'0.up': 0.0, '0.down': 0.0, '1.up': 0.75, '1.down': 0.5}
    """

    sparsities: dict[str, float]

    def __post_init__(self) -> None:
        if not self.sparsities:
            raise ValueError("sparsities={} must have at least one pattern.")
        for pattern, sparsity in self.sparsities.items():
            try:
                check_amount(sparsity)
            except ValueError as error:
                raise ValueError(f"sparsities[{pattern!r}]: {error}") from None

    def allocate(self, blocks: Sequence[LayerSizes], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Returns the sparsity of the first pattern that matches. See `Allocation.allocate`.

        Raises:
            ValueError: If a pattern matches no name.
        """
        check_amount(sparsity)
        names = [name for block in blocks for name in block]
        for pattern in self.sparsities:
            if not any(map(partial(fnmatchcase, pat=pattern), names)):
                raise ValueError(f"sparsities[{pattern!r}] matches none of the {len(names)} linear layers, such as {names[:3]}.")
        allocated = dict.fromkeys(names, sparsity)
        for pattern, value in reversed(self.sparsities.items()):  # the first pattern that matches applies last
            allocated |= dict.fromkeys((name for name in names if fnmatchcase(name, pattern)), value)
        return allocated


@dataclass(frozen=True)
class OWL(Allocation):
    """Lowers the sparsity of blocks with more outliers; the same for all layers of a block.

    D_b is the percentage of a block's scores above `multiple` times their mean. D, rescaled to [0, 2 lam], is subtracted from
    the sparsity and centered, so that the average over all weights equals the requested sparsity. Values are limited to [0,
    0.99], and the other blocks compensate.

    Reference: "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", Yin et al.,
    2023, https://arxiv.org/abs/2310.05175, section 3.2.

    Args:
        lam: Half of the largest difference between blocks, in [0, 0.5]; the paper's lambda, tuned there for each sparsity (0.08
            at 70%).
        multiple: Multiple of the mean above which a score is an outlier; the paper's M.

    Raises:
        ValueError: If `lam` is outside [0, 0.5], or `multiple` is not positive.

    Example:
        >>> import torch
        >>> owl = OWL(lam=0.1)
        >>> few, many = owl.measure([torch.tensor([1.0] * 10)]), owl.measure([torch.tensor([1.0] * 9 + [20.0])])
        >>> {name: round(s, 2) for name, s in owl.allocate([{"0.up": 8}, {"1.up": 8}], 0.5, [few, many]).items()}
        {'0.up': 0.6, '1.up': 0.4}
    """

    measures = True
    lam: float = 0.08
    multiple: float = 5.0

    def __post_init__(self) -> None:
        check_types(OWL, vars(self))
        check_fraction("lam", self.lam, "[0, 0.5]")
        check_number("multiple", self.multiple, above=0)

    def measure(self, scores: Sequence[Tensor]) -> float:
        """Computes the percentage of outliers, D_b = 100 mean(S > multiple * mean(S))."""
        size = sum(map(Tensor.numel, scores))
        bound = self.multiple * sum(float(layer.sum()) for layer in scores) / size
        return 100 * sum(int((layer > bound).sum()) for layer in scores) / size

    def allocate(self, blocks: Sequence[LayerSizes], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Lowers the sparsity of blocks with more outliers. See `Allocation.allocate`.

        Raises:
            ValueError: If the sparsity is not legal, or a block was not measured.
        """
        sparsity = check_amount(sparsity)
        if len(measured) != len(blocks):
            raise ValueError(f"measured must have a value for each of the {len(blocks)} blocks, got {len(measured)}.")
        least, most = min(measured), max(measured)
        shifts = [-2 * self.lam * (outliers - least) / (most - least) if most > least else -0.0 for outliers in measured]
        sizes = [sum(block.values()) for block in blocks]
        highest, allocated = max(HIGHEST, sparsity), dict[str, float]()
        low, high = -max(shifts), highest - min(shifts)
        for _ in range(100):  # finds the equal shift of all values, within [0, highest], that gives the mean weighted by size
            center = (low + high) / 2
            shifted = [min(max(shift + center, 0.0), highest) for shift in shifts]
            if sum(part * size for part, size in zip(shifted, sizes, strict=True)) < sparsity * sum(sizes):
                low = center
            else:
                high = center
        for block, block_sparsity in zip(blocks, shifted, strict=True):
            allocated |= dict.fromkeys(block, block_sparsity)
        return allocated


def allocate_sparsities(settings: WalkSettings, amount: float, allocation: Allocation) -> dict[str, float]:
    """Returns the sparsity of each linear layer; layers that no batch reaches get the average."""
    blocks, measured = settings.blocks, {}
    if allocation.measures:
        visitor = settings.walk("none", partial(_MeasuringVisitor, allocation))
        measured = settings.comm.decide(lambda: visitor.measured)  # ranks may round floats differently
    numbers = measured if allocation.measures else range(len(blocks))
    sizes = [{name: math.prod(size_of(linear)) for name, linear in blocks[number].linears.items()} for number in numbers]
    allocated = allocation.allocate(sizes, amount, list(measured.values())) if sizes else {}
    return dict.fromkeys(settings.layers, amount) | allocated


class _MeasuringVisitor(PruningVisitor):
    """A visitor that measures each block by Wanda's scores, and prunes nothing."""

    def __init__(self, allocation: Allocation, settings: WalkSettings, shared: bool) -> None:
        super().__init__(Wanda(), {}, "unstructured", None, settings, shared)
        self.allocation, self.measured, self.blocks = allocation, dict[int, float](), settings.blocks

    def finish(self, linears: ModulesByName) -> None:
        """Measures the blocks of these linear layers."""
        for block, site in enumerate(self.blocks):
            scores = []
            for name, linear in site.linears.items():
                if name in linears and name not in self.by_magnitude:
                    self.store.load(linear)
                    scores.append(self.scores(name, self.statistics_of(name)))
            if scores:
                self.measured[block] = self.allocation.measure(scores)
