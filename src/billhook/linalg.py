"""Linear algebra that several methods share: where float64 is, damped factors, and least squares with a ridge or on a support."""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

Solve = Callable[[Tensor], Tensor]
"""Puts M, with M A = C, in the place of C, `[rows, columns]`, and returns it."""


def float64_device(device: torch.device | str) -> torch.device:
    """Returns the device if it has float64, as GPUs of Apple, and some of Intel, do not, and otherwise the CPU.

    float32 would be too inaccurate for what is solved.
    """
    device = torch.device(device)
    return device if _has_float64(device) else torch.device("cpu")


def widest_float(device: torch.device | str) -> torch.dtype:
    """Returns float64, or float32 for a device without it: for sums that go on to where float64 is, and single numbers."""
    return torch.float64 if _has_float64(torch.device(device)) else torch.float32


def in_float64(tensor: Tensor) -> Tensor:
    """Converts to float64, on the CPU where the device has none; what is float64 already is not copied."""
    return tensor.to(float64_device(tensor.device)).double()


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type in ("cpu", "meta", "cuda"):
        return True
    try:
        torch.ones(2, device=device).to(torch.float64).sum().item()
    except (TypeError, RuntimeError):
        return False
    return True


def safe_divisor(sums: Tensor) -> Tensor:
    """Replaces zero divisors by one, so that zero over zero is zero."""
    return torch.where(sums > 0, sums, 1)


def damp_(h: Tensor, damping: float | Tensor) -> Tensor:
    """Adds damping * mean(diag(H)) to the diagonal of H, in place: more than zero, also where H is zero.

    So do SparseGPT (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774) and what came after it.
    """
    h.diagonal().add_((damping * h.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny))
    return h


def cholesky_(h: Tensor) -> tuple[Tensor, Tensor]:
    """Factors H = L L^T in the memory of H, which is symmetric and positive; the host waits for nothing.

    Args:
        h: H, `[size, size]`, row after row in memory; it is written over.

    Returns:
        L, column after column in that memory, and whether there is none: not zero then, int32, `[]`.
    """
    factor, failed = h.t(), torch.zeros((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, failed


def ridge_solver(h: Tensor, ridge: float) -> tuple[Solve, Tensor]:
    """Factors A = H + ridge D, D the diagonal of H, in the memory of H; the host waits for nothing.

    M A = C then gives the M that minimises tr(M H M^T) - 2 tr(M C^T) + ridge tr(M D M^T): least squares with a ridge, where H is
    E x x^T and C is E d x^T. Each input has a share of its own mean square for its ridge, as in Marquardt's method (1963,
    https://doi.org/10.1137/0111030), so that scaling inputs scales M alone.

    Args:
        h: H, `[size, size]`, float64, row after row in memory; it is written over.
        ridge: At infinity M is zero, as it is where H is.

    Returns:
        What solves for M, and whether there is a solution, bool, `[]`: M is NaN if the ridge is too small for moments that
        rounding has left without an inverse.
    """
    if ridge == math.inf:
        return Tensor.zero_, torch.ones((), dtype=torch.bool, device=h.device)
    diagonal = h.diagonal()
    there = diagonal.any()
    diagonal += ridge * diagonal + torch.finfo(h.dtype).eps * diagonal.sum() + there.logical_not()
    factor, failed = cholesky_(h)
    exists = failed == 0
    return partial(_solve, factor, torch.where(exists, there.to(h.dtype), math.nan)), exists


def _solve(factor: Tensor, scale: Tensor, owed: Tensor) -> Tensor:
    """Solves M L L^T = C: L Y = C^T, then L^T M^T = Y."""
    columns = owed.t()
    torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
    torch.linalg.solve_triangular(factor.t(), columns, upper=True, out=columns)
    return owed.mul_(scale)


def conjugate_gradients(solution: Tensor, residual: Tensor, h: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Moves V towards the minimum of tr((W - V) H (W - V)^T) over a support, in place.

    Every row is a problem of its own, with one matrix H and another support. All rows take their steps together, preconditioned
    by the diagonal of H, with one product by H a step. The error never rises from step to step. Algorithm 2 of "ALPS: Improved
    Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng, Behdin, Wang & Mazumder, 2024,
    https://arxiv.org/abs/2406.07831).

    Args:
        solution: V at the start, zero outside of the support: `[rows, columns]`, float32 or float64.
        residual: (W - V) H on the support, zero outside; it is written over.
        h: H, `[columns, columns]`, symmetric and positive.
        keep: The support, bool.
        steps: Number of steps.
    """
    scale = h.diagonal().clamp(min=torch.finfo(h.dtype).tiny)
    scaled = residual / scale
    direction = scaled.clone()
    before = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        curvature = (direction @ h).mul_(keep)
        length = before / safe_divisor((direction * curvature).sum(1, keepdim=True))
        solution.add_(direction * length)
        residual.sub_(curvature.mul_(length))
        scaled = torch.div(residual, scale, out=scaled)
        after = (residual * scaled).sum(1, keepdim=True)
        direction.mul_(after / safe_divisor(before)).add_(scaled)
        before = after
    return solution
