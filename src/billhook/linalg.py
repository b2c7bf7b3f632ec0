"""Linear algebra, in float64 if the device has it: damped factors and least squares."""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]  # positions along a dimension
IndicesByModule = Mapping[str, Indices]
TensorsByName = Mapping[str, Tensor]
TensorDict = dict[str, Tensor]
Solve = Callable[[Tensor], Tensor]  # solves M A = C in the memory of C, `[rows, columns]`, and returns M


def float64_device(device: torch.device | str) -> torch.device:
    """Returns the device if it supports float64, otherwise the CPU.

    GPUs of Apple, and some of Intel, have no float64; float32 is too inaccurate for these solvers.
    """
    device = torch.device(device)
    return device if _has_float64(device) else torch.device("cpu")


def widest_float(device: torch.device | str) -> torch.dtype:
    """Returns float64, or float32 if the device has no float64.

    For sums that are solved on another device later, and for single numbers.
    """
    return torch.float64 if _has_float64(torch.device(device)) else torch.float32


def in_float64(tensor: Tensor) -> Tensor:
    """Converts to float64, on the CPU if the device has none. A float64 tensor is not copied."""
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
    """Replaces zero divisors with 1, so that zero over zero is zero."""
    return torch.where(sums > 0, sums, 1)


def damp_(h: Tensor, damping: float | Tensor) -> Tensor:
    """Adds damping * mean(diag(H)) to the diagonal of H, in place.

    The result is positive even if H is zero. Used in SparseGPT (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774) and
    its successors.
    """
    h.diagonal().add_((damping * h.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny))
    return h


def cholesky_(h: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a symmetric positive H = L L^T in its own memory, without a host sync.

    Args:
        h: H, `[size, size]`, row-major; it is overwritten.

    Returns:
        L, column-major in the memory of H, and the error code: int32, `[]`, nonzero if H has no factor.
    """
    factor, failed = h.t(), torch.zeros((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, failed


def ridge_solver(h: Tensor, ridge: float) -> tuple[Solve, Tensor]:
    """Factors A = H + ridge D, D the diagonal of H, in the memory of H, without a host sync.

    M A = C then gives the M that minimizes tr(M H M^T) - 2 tr(M C^T) + ridge tr(M D M^T): least squares with a ridge penalty,
    where H is E x x^T and C is E d x^T. The penalty of each input is relative to its own mean square, so that scaling inputs only
    scales M.

    Reference: Marquardt (1963), https://doi.org/10.1137/0111030.

    Args:
        h: H, `[size, size]`, float64, row-major; it is overwritten.
        ridge: Ridge penalty. If it is infinite, M is zero; it is also zero if H is.

    Returns:
        The solver for M, and whether a solution exists: bool, `[]`. Otherwise M is NaN, because the penalty is too small for a
        Gram matrix that rounding has made singular.
    """
    if ridge == math.inf:
        return Tensor.zero_, torch.ones((), dtype=torch.bool, device=h.device)
    diagonal = h.diagonal()
    is_nonzero = diagonal.any()
    diagonal += ridge * diagonal + torch.finfo(h.dtype).eps * diagonal.sum() + is_nonzero.logical_not()
    factor, failed = cholesky_(h)
    exists = failed == 0
    return partial(_solve, factor, torch.where(exists, is_nonzero.to(h.dtype), math.nan)), exists


def _solve(factor: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Solves M L L^T = C: L Y = C^T, then L^T M^T = Y."""
    columns = target.t()
    torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
    torch.linalg.solve_triangular(factor.t(), columns, upper=True, out=columns)
    return target.mul_(scale)


def conjugate_gradients(solution: Tensor, residual: Tensor, h: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Minimizes tr((W - V) H (W - V)^T) over V with a fixed support, in place.

    Every row is a separate problem with the same matrix H and its own support. All rows step together, with one product by H per
    step and the diagonal of H as preconditioner. The error never increases.

    Reference: Algorithm 2 of "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng,
    Behdin, Wang & Mazumder, 2024), https://arxiv.org/abs/2406.07831.

    Args:
        solution: V at the start, zero outside the support: `[rows, columns]`, float32 or float64.
        residual: (W - V) H on the support, zero outside; it is overwritten.
        h: H, `[columns, columns]`, symmetric and positive.
        keep: Support, bool.
        steps: Number of steps.
    """
    scale = h.diagonal().clamp(min=torch.finfo(h.dtype).tiny)
    scaled = residual / scale
    direction = scaled.clone()
    energy = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        curvature = (direction @ h).mul_(keep)
        length = energy / safe_divisor((direction * curvature).sum(1, keepdim=True))
        solution.add_(direction * length)
        residual.sub_(curvature.mul_(length))
        scaled = torch.div(residual, scale, out=scaled)
        next_energy = (residual * scaled).sum(1, keepdim=True)
        direction.mul_(next_energy / safe_divisor(energy)).add_(scaled)
        energy = next_energy
    return solution


def over_dims(positions: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Returns positions along a dimension as an index of `gather`, like the tensor elsewhere.

    Args:
        positions: `[positions]`, or `[len(tensor), positions]` with other positions for each entry of the first dimension.
        tensor: The tensor.
        dim: The dimension, not the first one if positions differ.
    """
    sizes = [1] * tensor.dim()
    sizes[0], sizes[dim] = (1 if positions.dim() == 1 else len(positions)), positions.shape[-1]
    expanded = list(tensor.shape)
    expanded[dim] = positions.shape[-1]
    return positions.view(sizes).expand(expanded)
