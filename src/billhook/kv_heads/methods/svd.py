"""The best low-rank rendering of a group of heads: a truncated singular value decomposition.

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936 (https://doi.org/10.1007/BF02288367).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from billhook.kv_heads.methods.base import Rendered, Rendering
from billhook.kv_heads.methods.mean import Mean

TINY = 1e-12
"""Eigenvalues below this share of the largest count as this share: float64 resolves no more."""


@dataclass(frozen=True)
class SVD(Rendered):
    """Takes the one head, and what each query head and output makes of it, with which least is lost on the batches.

    A reader r of head j sees r^H k_j, and would see r^H B_j kbar. The sum over the readers of the mean square of the difference
    is E||S_j (k_j - B_j kbar)||^2, S_j^2 = sum of E[r r^H]. The readers of values are the rows of W_O; those of keys are queries,
    treated as independent of the keys as if any could meet any, and, of pairs, turned by any angle.

    Stack these over the heads, T = [S_1 k_1; ...; S_J k_J]. Any choice of B and P replaces T by [S_j B_j]_j kbar, of rank w, and
    of all such the nearest is U U^H T, where the columns of U are the w first eigenvectors of
    E[T T^H] = [S_i E[k_i k_j^H] S_j]_ij (Eckart and Young); the loss is the sum of the other eigenvalues. It is reached with
    kbar = D U^H T, so P_j = D U_j^H S_j and B_j = S_j^-1 U_j D^-1, U_j being the rows of U of head j, for any invertible D.
    D = c l^-1/4, l the w first eigenvalues, gives B and kbar equal parts of the singular values l^1/2, and c gives kbar the mean
    square of the heads that it stands for, so that training continues at the scale that it had.

    Where a metric is zero altogether it counts as the identity; where all moments are zero nothing can be lost, and the mean is
    taken.

    Args:
        grouping: Which heads share a group: `"consecutive"`, those next to each other, or `"similar"`, those that one head
            renders best; query heads then change places along with them.

    Example:
        >>> import billhook as bh, torch
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(3, 67)[None]}]
        >>> bh.convert_kv_heads(model, 2, bh.SVD(), batches).after
        2
    """

    least_batches: ClassVar[int] = 1
    has_path: ClassVar[bool] = False

    def render(self, metric: Tensor, moments: Tensor) -> Rendering:
        """Returns B and P from the first eigenvectors of the stacked moments."""
        count, width = moments.shape[:2]
        root, inverse = _roots(metric)
        stacked = torch.einsum("iab,ibjc,jcd->iajd", root, moments, root).reshape(count * width, count * width)
        values, vectors = torch.linalg.eigh((stacked + stacked.mH) / 2)
        if not values[-1] > torch.finfo(values.dtype).tiny:
            return Mean().render(metric, moments)
        scale = values[-width:].clamp_min(TINY * values[-1]).pow(-0.25)
        top = vectors[:, -width:].reshape(count, width, width)
        shared = scale[None, :, None] * (top.mH @ root)
        basis = inverse @ top / scale
        within = torch.einsum("iab,ibjc,jdc->ad", shared, moments, shared.conj())
        factor = (torch.einsum("jaja->", moments).real / count / within.diagonal().sum().real).sqrt()
        return Rendering(basis / factor, shared * factor)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Returns S and S^-1; what has no reader counts as read a little, and then follows what the others need."""
    values, vectors = torch.linalg.eigh((metric + metric.mH) / 2)
    values = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
    values = values.clamp_min(TINY).sqrt().to(metric.dtype)[:, None]
    return vectors * values @ vectors.mH, vectors / values @ vectors.mH
