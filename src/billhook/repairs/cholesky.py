"""Solves M (H + ridge D) = C for M by Cholesky's factors, panel by panel, in the memory of half of H."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from billhook.repairs.triangle import Triangle

Solver = Callable[[Tensor], Tensor]
"""Puts M in the place of C, `[rows, size]`, row after row in memory, float64."""


def solver(inner: Triangle, ridge: float) -> Solver | None:
    """Factors H + ridge D, D the diagonal of H, in the memory of H.

    Args:
        inner: H, which is written over.
        ridge: At infinity M is zero, as it is where H is.

    Returns:
        What solves for M; None if the ridge is too small for moments that rounding has left without an inverse.
    """
    diagonal = inner.diagonal()
    if ridge == math.inf or not diagonal.any():
        return Tensor.zero_
    inner.add_diagonal(ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum())
    return partial(_solve, inner) if _factor(inner) else None


def _factor(inner: Triangle) -> bool:
    """Puts L, with H = L L^T, in the place of H; False if there is none.

    Of panel i, L_ij = (H_ij - sum_k<j L_ik L_jk^T) L_jj^-T for each j < i, and L_ii is the factor of H_ii - sum_k<i L_ik L_ik^T.
    """
    for own, panel in inner.placed():
        for columns, other in inner.placed(own.start):
            left = panel[:, columns]
            left.addmm_(panel[:, : columns.start], other[:, : columns.start].t(), alpha=-1)
            left.copy_(torch.linalg.solve_triangular(other[:, columns].t(), left, upper=True, left=False))
        square = panel[:, own]
        square.addmm_(panel[:, : own.start], panel[:, : own.start].t(), alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(square)
        if failed:
            return False
        square.copy_(factor)
    return True


def _solve(factor: Triangle, owed: Tensor) -> Tensor:
    """Solves M L L^T = C: first Y L^T = C, panel after panel, then M L = Y, back again."""
    for own, panel in factor.placed():
        right = owed[:, own]
        right.addmm_(owed[:, : own.start], panel[:, : own.start].t(), alpha=-1)
        right.copy_(torch.linalg.solve_triangular(panel[:, own].t(), right, upper=True, left=False))
    for own, panel in reversed(factor.placed()):
        right = owed[:, own]
        right.copy_(torch.linalg.solve_triangular(panel[:, own], right, upper=False, left=False))
        owed[:, : own.start].addmm_(right, panel[:, : own.start], alpha=-1)
    return owed
