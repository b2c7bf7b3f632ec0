"""The lower triangle of a symmetric matrix, in panels of rows: half of the memory that the matrix takes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from billhook.running.statistics import ROWS, TOKENS, add_products


class Triangle:
    """A sum of x x^T over tokens, of which the lower triangle is kept, float64.

    Attributes:
        panels: Some rows each, with all columns up to the last of these rows.

    >>> triangle = Triangle(2)
    >>> triangle.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> triangle.full()
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        ends = [min(first + ROWS, size) for first in range(0, size, ROWS)]
        heights = [end - first for first, end in zip(range(0, size, ROWS), ends, strict=True)]
        self._size = size
        self.panels = [
            torch.zeros(height, end, dtype=torch.float64, device=device) for height, end in zip(heights, ends, strict=True)
        ]

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds left^T right, which is symmetric, of two matrices `[tokens, size]`."""
        for rows, panel in self._placed():
            add_products(panel, left[:, rows], right[:, : panel.shape[1]])

    def add_to(self, matrix: Tensor) -> None:
        """Adds the lower triangle to that of a matrix; what this then has above its diagonal is of no use."""
        for rows, panel in self._placed():
            matrix[rows, : panel.shape[1]] += panel

    def diagonal(self) -> Tensor:
        """Returns a copy of the diagonal, `[size]`."""
        return torch.cat([panel.diagonal(panel.shape[1] - len(panel)) for panel in self.panels])

    def full(self) -> Tensor:
        """Returns the whole matrix, `[size, size]`."""
        matrix = self.panels[0].new_zeros(self._size, self._size)
        self.add_to(matrix)
        return matrix.tril_() + matrix.tril(-1).t()

    def form(self, rows: Tensor) -> Tensor:
        """Computes the sum of r H r^T over rows r, `[..., size]`: `[]`."""
        total = rows.new_zeros(())
        for some in torch.split(rows, TOKENS):
            for own, panel in self._placed():
                turned = some[:, own] @ panel
                turned[:, : own.start] *= 2
                total += turned.mul_(some[:, : own.stop]).sum()
        return total

    def _placed(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the panels, each with the rows that it has."""
        return ((slice(panel.shape[1] - len(panel), panel.shape[1]), panel) for panel in self.panels)
