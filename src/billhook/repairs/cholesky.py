"""Solves M (H + ridge D) = C for M by Cholesky's factors, panel by panel, in the memory of half of H."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from billhook.repairs.triangle import Triangle

Solver = Callable[[Tensor], Tensor]
"""Puts M in the place of C, `[rows, size]`, row after row in memory, float64."""


def solver(inner: Triangle, ridge: float) -> tuple[Solver, Tensor]:
    """Factors H + ridge D, D the diagonal of H, in the memory of H; the host waits for nothing.

    Args:
        inner: H, which is written over.
        ridge: At infinity M is zero, as it is where H is.

    Returns:
        What solves for M, and whether there is a solution, bool, `[]`: M is NaN if the ridge is too small for moments that
        rounding has left without an inverse.
    """
    diagonal = inner.diagonal()
    if ridge == math.inf:
        return Tensor.zero_, torch.ones((), dtype=torch.bool, device=diagonal.device)
    there = diagonal.any()
    inner.add_diagonal(ridge * diagonal + torch.finfo(torch.float64).eps * diagonal.sum() + there.logical_not())
    exists = _factor(inner)
    return partial(_solve, inner, there), exists


def _factor(inner: Triangle) -> Tensor:
    """Puts L, with H = L L^T, in the place of H; returns whether there is one, bool, `[]`: otherwise it is NaN.

    Of panel i, L_ij = (H_ij - sum_k<j L_ik L_jk^T) L_jj^-T for each j < i, and L_ii is the factor of H_ii - sum_k<i L_ik L_ik^T.
    """
    exists = torch.ones((), dtype=torch.bool, device=inner.panels[0].device)
    for own, panel in inner.placed():
        for columns, other in inner.placed(own.start):
            left = panel[:, columns]
            left.addmm_(panel[:, : columns.start], other[:, : columns.start].t(), alpha=-1)
            left.copy_(torch.linalg.solve_triangular(other[:, columns].t(), left, upper=True, left=False))
        square = panel[:, own]
        square.addmm_(panel[:, : own.start], panel[:, : own.start].t(), alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(square)
        exists &= failed == 0
        square.copy_(torch.where(exists, factor, math.nan))
    return exists


def _solve(factor: Triangle, there: Tensor, owed: Tensor) -> Tensor:
    """Solves M L L^T = C: first Y L^T = C, panel after panel, then M L = Y, back again; M is zero unless H is `there`."""
    for own, panel in factor.placed():
        right = owed[:, own]
        right.addmm_(owed[:, : own.start], panel[:, : own.start].t(), alpha=-1)
        right.copy_(torch.linalg.solve_triangular(panel[:, own].t(), right, upper=True, left=False))
    for own, panel in reversed(factor.placed()):
        right = owed[:, own]
        right.copy_(torch.linalg.solve_triangular(panel[:, own], right, upper=False, left=False))
        owed[:, : own.start].addmm_(right, panel[:, : own.start], alpha=-1)
    return owed.mul_(there)
