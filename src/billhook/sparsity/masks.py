"""Masks from scores: bool, True where a weight is kept, with exact counts.

The mask equals that of a full stable ascending sort: of equal scores the lower column is removed first. Only the lowest kept
score is selected, in blocks of rows or in a copy of the matrix, without a sort. Scores of any floating-point dtype are compared
as float32. NaN raises an error.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from billhook.arguments import check_fraction

CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**24
"""Scores per block: small enough for a core's cache, large enough to use an accelerator."""

FEWEST = 16  # tokens from which Wanda's norms prune an expert better than magnitude (docs/evidence/experts.md)
HOST = "cpu"
"""Device on which NumPy selects and packs, up to ten times faster than torch; on others torch does, without a host sync."""

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by size in bytes; multiplied by 0 or 1 they clear or keep the bits."""

MAX_PAIRED = 8
"""Widest N:M group in which comparing all pairs is faster than selection."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Parses `"N:M"` to (N, M), and `"unstructured"` to None.

    Raises:
        ValueError: If it is neither.

    >>> parse_pattern("2:4"), parse_pattern("unstructured")
    ((2, 4), None)
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pattern) if isinstance(pattern, str) else None
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={pattern!r} must be 'unstructured' or 'N:M' with 1 <= N < M (N of every M inputs are kept).")
    return int(match[1]), int(match[2])


def check_amount(sparsity: float | None, pattern: str = "unstructured") -> float:
    """Returns the fraction of weights to zero.

    Args:
        sparsity: Fraction in [0, 1). With an N:M pattern, None or the sparsity of the pattern.
        pattern: `"unstructured"` or `"N:M"`.

    Raises:
        ValueError: If the sparsity is not legal, missing, or contradicts the pattern.

    >>> check_amount(0.7), check_amount(None, "2:4")
    (0.7, 0.5)
    """
    kept = parse_pattern(pattern)
    if sparsity is None and kept is None:
        raise ValueError("sparsity=None requires an N:M pattern. Pass a fraction in [0, 1), or a pattern such as '2:4'.")
    if sparsity is not None:
        check_fraction("sparsity", sparsity, of="the weights")
    if kept is None:
        return float(sparsity or 0)
    implied = (kept[1] - kept[0]) / kept[1]
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-3):
        raise ValueError(
            f"sparsity={sparsity} contradicts pattern={pattern!r}, a sparsity of {implied:g}. Pass only one of them."
        )
    return implied


def check_width(in_features: int, pattern: str) -> None:
    """Raises if M of an N:M pattern does not divide the number of inputs."""
    kept = parse_pattern(pattern)
    if kept is not None and in_features % kept[1]:
        raise ValueError(f"pattern={pattern!r} needs a multiple of {kept[1]} input features, got {in_features}.")


def pruned_count(size: int, sparsity: float) -> int:
    """Computes the number of weights to remove, int(size * sparsity), corrected for rounding.

    >>> pruned_count(10, 0.7), pruned_count(100, 0.29), int(100 * 0.29)
    (7, 29, 28)
    """
    product = size * check_amount(sparsity)
    rounded = round(product)
    return rounded if rounded < size and math.isclose(product, rounded, rel_tol=1e-12) else int(product)


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Removes int(columns * sparsity) scores of each row of `[rows, columns]`.

    >>> keep_rows(torch.tensor([[3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 9.0]]), 0.5).int()
    tensor([[1, 0, 0, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    count = pruned_count(scores.shape[1], sparsity)
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows, block in _blocks(scores):
        _drop_lowest(block, count, keep[rows])
    return keep


def keep_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Compares within the matrix, and removes int(numel * sparsity) of all scores.

    Of equal scores, lower rows and then lower columns are removed first.

    >>> keep_layer(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.25).int()
    tensor([[1, 0],
            [1, 1]], dtype=torch.int32)
    """
    count = pruned_count(scores.numel(), sparsity)
    if scores.device.type == "cpu" and count:  # NumPy's selection is faster
        parted = np.partition(scores.detach().float().numpy(), count, axis=None)
        lowest = RemovalThreshold(float(parted[count]), count - int(np.count_nonzero(parted[:count] < parted[count])))
        del parted  # as large as the scores; frees memory for the mask
    else:
        lowest = RemovalThreshold.of(lambda: [scores], count)
    return lowest.keep(scores)


@dataclass
class RemovalThreshold:
    """The threshold below which scores of several matrices are removed, in sequence.

    Attributes:
        kept: Lowest score that is kept.
        tied: Number of scores equal to it that are still to be removed.
    """

    kept: float
    tied: int

    @classmethod
    def of(cls, scores: Callable[[], Iterable[Tensor]], count: int) -> "RemovalThreshold":
        """Finds the threshold for `count` scores by radix selection, 16 bits at a time.

        Calls `scores` twice, which yields matrices `[out_features, in_features]`.
        """
        if not count:
            return cls(-math.inf, 0)
        high, lower = _digit_at(((keys >> 16) + 2**15 for keys in _keys(scores())), count)
        within = (keys[keys >> 16 == high - 2**15] & 0xFFFF for keys in _keys(scores()))
        low, lower_within = _digit_at(within, count - lower)
        key = torch.tensor((high - 2**15) * 2**16 + low, dtype=torch.int32)
        return cls(float(_flip(key).view(torch.float32)), count - lower - lower_within)

    def keep(self, scores: Tensor) -> Tensor:
        """Returns the mask of the next matrix, `[out_features, in_features]`."""
        kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        for rows, block in _blocks(scores):
            keep = torch.ge(block, self.kept, out=kept[rows])
            if self.tied:
                ties = (block == self.kept).flatten().nonzero()[: self.tied, 0]
                keep.view(-1)[ties] = False
                self.tied -= len(ties)
        return kept


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n highest of every m consecutive scores along the last dimension.

    Args:
        scores: The scores, `[..., columns]`.
        n: Number of kept scores.
        m: Size of a group, which divides the columns.

    >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]), 2, 4).int()
    tensor([[0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    check_width(scores.shape[-1], f"{n}:{m}")
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows, block in _blocks(scores):
        groups, kept = block.reshape(-1, m), keep[rows].view(-1, m)
        if m <= MAX_PAIRED:
            # ranks each score in its group, in stable ascending order
            columns = groups.t().contiguous()
            ranks = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
            for later in range(1, m):
                for earlier in range(later):
                    lower = columns[earlier] <= columns[later]
                    ranks[later] += lower
                    ranks[earlier] += ~lower
            torch.ge(ranks.t(), m - n, out=kept)
        else:
            _drop_lowest(groups, m - n, kept)
    return keep


def where_kept(values: Tensor, keep: Tensor) -> Tensor:
    """Returns the values where the mask is True, and 0 elsewhere, even for NaN.

    On the CPU the bits are multiplied as integers, ten times faster than `masked_fill` with an irregular mask.

    >>> where_kept(torch.tensor([1.0, -2.0, torch.nan]), torch.tensor([True, False, False]))
    tensor([1., 0., 0.])
    """
    if values.device.type != HOST:
        return torch.where(keep, values.detach(), 0)
    bits = WHOLE[values.element_size()]
    return (values.detach().view(bits) * keep.view(torch.uint8).to(bits)).view(values.dtype)


def sparsity_of(tensors: Iterable[Tensor]) -> float:
    """Computes the fraction of elements that are zero, or False in masks; 0 if there are none.

    >>> sparsity_of([torch.tensor([0.0, 1.0]), torch.tensor([True, True])])
    0.25
    """
    pairs = [(int(torch.count_nonzero(tensor)), tensor.numel()) for tensor in tensors]
    nonzero, total = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    return 1 - nonzero / total if total else 0.0


def _blocks(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields blocks of rows in float32; NaN raises."""
    if scores.numel() == 0:
        return
    size = CPU_BLOCK if scores.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, size * len(scores) // scores.numel())
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        block = scores.detach()[rows].float()
        if block.amax().isnan():
            raise ValueError(
                f"a score is NaN (the first in row {start + int(block.isnan().reshape(len(block), -1).any(1).int().argmax())})"
            )
        yield rows, block


def _drop_lowest(block: Tensor, count: int, keep: Tensor) -> None:
    """Writes a mask of the scores that are not among the `count` lowest of their row."""
    on_host = block.device.type == HOST
    if on_host:
        lowest_kept = torch.from_numpy(np.partition(block.numpy(), count, axis=1)[:, count : count + 1])
    else:
        lowest_kept = block.topk(count + 1, largest=False, sorted=False).values.amax(1, keepdim=True)
    torch.ge(block, lowest_kept, out=keep)
    # all ties with the lowest kept score are kept so far; a full stable sort removes the first of them
    tied = keep.sum(1, keepdim=True, dtype=torch.int32) - (block.shape[1] - count)
    if not on_host:
        keep &= ~_first(block == lowest_kept, tied)
    elif len(rows := np.flatnonzero(tied.numpy())):  # few rows have ties
        keep.numpy()[rows] &= ~_first(block[rows] == lowest_kept[rows], tied[rows]).numpy()


def _first(ties: Tensor, count: Tensor) -> Tensor:
    """Returns the first ties of each row."""
    return ties & (ties.cumsum(1, dtype=torch.int32) <= count)


def _digit_at(digits: Iterable[Tensor], position: int) -> tuple[int, int]:
    """Returns the digit at a position in ascending order, and the number of lower digits."""
    counts = torch.zeros(2**16, dtype=torch.int64)
    for part in digits:
        counts += torch.bincount(part, minlength=2**16).cpu()
    ends = counts.cumsum(0)
    digit = int(torch.searchsorted(ends, position, right=True))
    return digit, int(ends[digit] - counts[digit])


def _keys(scores: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields integers in the order of the scores, block by block."""
    for matrix in scores:
        for _, block in _blocks(matrix):
            yield _flip((block.flatten() + 0.0).view(torch.int32))  # + 0.0: -0.0 and 0.0 are equal scores


def _flip(bits: Tensor) -> Tensor:
    """Converts between the bits of a float32 and an int32 of the same order, both ways."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
