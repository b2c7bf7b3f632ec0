"""Solves least squares on a support by conjugate gradients, all rows of a matrix together.

"ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (Meng, Behdin, Wang & Mazumder, 2024,
https://arxiv.org/abs/2406.07831), algorithm 2.
"""

import torch
from torch import Tensor


def on_support(solution: Tensor, residual: Tensor, h: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Moves V towards the minimum of tr((W - V) H (W - V)^T) over a support, in place.

    Every row is a problem of its own, with one matrix H and another support. All rows take their steps together, preconditioned
    by the diagonal of H, with one product by H a step. The error never rises from step to step.

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
        turned = (direction @ h).mul_(keep)
        length = before / nonzero((direction * turned).sum(1, keepdim=True))
        solution.add_(direction * length)
        residual.sub_(turned.mul_(length))
        scaled = torch.div(residual, scale, out=scaled)
        after = (residual * scaled).sum(1, keepdim=True)
        direction.mul_(after / nonzero(before)).add_(scaled)
        before = after
    return solution


def nonzero(sums: Tensor) -> Tensor:
    """Replaces zero divisors by one, so that zero over zero is zero."""
    return torch.where(sums > 0, sums, 1)
