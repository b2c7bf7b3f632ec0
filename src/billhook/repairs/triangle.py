"""The lower triangle of a symmetric matrix, in panels of rows: half of the memory that the matrix takes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from billhook.engine.offload import Shelf, zeros
from billhook.engine.statistics import ROWS, TOKENS, add_products


class Triangle:
    """A sum of x x^T over tokens, of which the lower triangle is kept, float64.

    Panels may lie in files.

    Args:
        size: How many rows the whole has.
        device: Where panels are, if not in files.
        files: What keeps them there.

    Attributes:
        size: How many rows the whole has.
        panels: Some rows each, with all columns up to the last of these rows.

    >>> triangle = Triangle(2)
    >>> triangle.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> triangle.full()
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", files: Shelf | None = None) -> None:
        ends = [min(first + ROWS, size) for first in range(0, size, ROWS)]
        heights = [end - first for first, end in zip(range(0, size, ROWS), ends, strict=True)]
        self.size = size
        self.panels = [zeros((height, end), torch.float64, device, files) for height, end in zip(heights, ends, strict=True)]

    @classmethod
    def of(cls, matrix: Tensor) -> Self:
        """Copies a symmetric matrix, of which the lower triangle is read."""
        own = cls(len(matrix), matrix.device)
        for rows, panel in own.placed():
            panel.copy_(matrix[rows, : rows.stop])
        return own

    @classmethod
    def mean(cls, sums: Sequence[Self], count: Tensor, about: Tensor | None = None) -> Self:
        """Returns the sum of matrices, over a count, less c c^T where there is a centre c to take it about."""
        own = cls(sums[0].size, sums[0].panels[0].device)
        for number, (rows, panel) in enumerate(own.placed()):
            for one in sums:
                panel += one.panels[number]
            panel /= count
            if about is not None:
                panel.addr_(about[rows], about[: rows.stop], alpha=-1)
        return own

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds left^T right, which is symmetric, of two matrices `[tokens, size]`."""
        for rows, panel in self.placed():
            add_products(panel, left[:, rows], right[:, : rows.stop])

    def diagonal(self) -> Tensor:
        """Returns a copy of the diagonal, `[size]`."""
        return torch.cat([panel.diagonal(rows.start) for rows, panel in self.placed()])

    def add_diagonal(self, values: Tensor) -> None:
        """Adds values to the diagonal, `[size]`."""
        for rows, panel in self.placed():
            panel.diagonal(rows.start).add_(values[rows])

    def full(self) -> Tensor:
        """Returns the whole matrix, `[size, size]`."""
        matrix = self.panels[0].new_empty(self.size, self.size)
        for rows, panel in self.placed():
            matrix[rows, : rows.start] = panel[:, : rows.start]
            matrix[: rows.start, rows] = panel[:, : rows.start].t()
            square = panel[:, rows]
            matrix[rows, rows] = square.tril() + square.tril(-1).t()
        return matrix

    def form(self, rows: Tensor) -> Tensor:
        """Computes the sum of r H r^T over rows r, `[..., size]`: `[]`."""
        total = rows.new_zeros(())
        for own, panel in self.placed():
            for some in torch.split(rows, TOKENS):
                turned = some[:, own] @ panel
                turned[:, : own.start] *= 2
                total += turned.mul_(some[:, : own.stop]).sum()
        return total

    def placed(self, end: int | None = None) -> list[tuple[slice, Tensor]]:
        """Returns the panels, each with the rows that it has; those before a row alone, if one is given."""
        placed = [(slice(panel.shape[1] - len(panel), panel.shape[1]), panel) for panel in self.panels]
        return [(rows, panel) for rows, panel in placed if end is None or rows.stop <= end]
