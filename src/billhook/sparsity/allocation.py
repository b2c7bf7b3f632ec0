"""Allocation: how much each linear layer gives, when the model as a whole is to give a fraction.

A model is described block by block, as what each linear's name and number of weights are. An allocation that goes by how
important weights are measures each block's scores first, one block at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from billhook.sparsity.masks import check_amount

HIGHEST = 0.99
"""No linear gives more, unless the model as a whole is to."""

Block = Mapping[str, int]
"""The number of weights of each linear of a block, by name."""


class Allocation(ABC):
    """How much each linear gives."""

    @property
    def measures(self) -> bool:
        """Whether `allocate` needs what `measure` says of each block."""
        return False

    def measure(self, scores: Sequence[Tensor]) -> float:
        """What has to be known of a block.

        Args:
            scores: Wanda's scores of each linear of the dense block, `[out_features, in_features]`.
        """
        return 0.0

    @abstractmethod
    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """The sparsity of each linear by name, each in [0, 1).

        Args:
            blocks: The linears' sizes, block by block.
            sparsity: Of the model as a whole, in [0, 1).
            measured: What `measure` said of each block.

        Raises:
            ValueError: If the sparsity is not legal, or `measured` is needed and has not one value a block.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for each linear."""

    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """The sparsity itself. See `Allocation.allocate`."""
        return dict.fromkeys((name for block in blocks for name in block), check_amount(sparsity))


@dataclass(frozen=True)
class ByPattern(Allocation):
    """What is said of each linear by name; what no pattern matches gives the sparsity of the whole.

    The whole then comes to what the parts come to, not to the sparsity asked for.

    Args:
        sparsities: By glob pattern, such as `"*.down_proj"` or `"model.layers.[0-3].*"`. The first that matches a name holds.

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
        """What the first matching pattern says. See `Allocation.allocate`.

        Raises:
            ValueError: If a pattern matches no name.
        """
        check_amount(sparsity)
        names = [name for block in blocks for name in block]
        for pattern in self.sparsities:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"sparsities[{pattern!r}] matches none of the {len(names)} linears, such as {names[:3]}")
        return {name: self._said(name, sparsity) for name in names}

    def _said(self, name: str, otherwise: float) -> float:
        return next((s for pattern, s in self.sparsities.items() if fnmatchcase(name, pattern)), otherwise)


@dataclass(frozen=True)
class OWL(Allocation):
    """Blocks with more outliers give less (2310.05175, section 3.2); all linears of a block give the same.

    D_b is the percentage of a block's scores above `multiple` times their mean. D rescaled to [0, 2 lam] is taken from the
    sparsity, and centred, so that the average over all weights is the sparsity asked for. What would leave [0, 0.99] stops there,
    and the other blocks make up for it.

    Args:
        lam: Half of the widest gap between blocks; the paper's lambda, which it tunes at each sparsity (0.08 at 70 %).
        multiple: How many times the mean makes an outlier; the paper's M.

    Raises:
        ValueError: If `lam` is outside [0, 0.5], or `multiple` is not positive.
    """

    lam: float = 0.08
    multiple: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 0.5:
            raise ValueError(f"lam={self.lam} must be in [0, 0.5]: the gap between blocks is twice that")
        if not self.multiple > 0:
            raise ValueError(f"multiple={self.multiple} must be positive")

    @property
    def measures(self) -> bool:
        """True: the outliers of each block."""
        return True

    def measure(self, scores: Sequence[Tensor]) -> float:
        """The percentage of outliers, D_b = 100 mean(S > multiple * mean(S)) over all scores of the block."""
        size = sum(s.numel() for s in scores)
        bound = self.multiple * sum(float(s.sum()) for s in scores) / size
        return 100 * sum(int((s > bound).sum()) for s in scores) / size

    def allocate(self, blocks: Sequence[Block], sparsity: float, measured: Sequence[float] = ()) -> dict[str, float]:
        """Less where more was measured. See `Allocation.allocate`."""
        sparsity = check_amount(sparsity)
        if len(measured) != len(blocks):
            raise ValueError(f"measured must have one value for each of {len(blocks)} blocks, got {len(measured)}")
        low, high = min(measured), max(measured)
        gaps = [2 * self.lam * (d - low) / (high - low) if high > low else 0.0 for d in measured]
        sizes = [sum(block.values()) for block in blocks]
        amounts = _centre([-gap for gap in gaps], sizes, sparsity)
        return {name: amount for block, amount in zip(blocks, amounts, strict=True) for name in block}


def _centre(values: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """The values moved by one number, and stopped at 0 and `HIGHEST`, so that their mean weighted by size is as asked."""
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
