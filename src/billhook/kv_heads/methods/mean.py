"""The mean of the heads of a group.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
(https://arxiv.org/abs/2305.13245), section 2.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from billhook.kv_heads.methods.base import Rendered, Rendering


@dataclass(frozen=True)
class Mean(Rendered):
    """Pools the heads of a group to their mean, as the GQA paper does: W_group = 1/J sum over j of W_j.

    The mean is summed in float32 at least.

    Args:
        grouping: Which heads share a group: `"consecutive"`, those next to each other, or `"similar"`, those whose mean loses
            least; query heads then change places along with them.

    Example:
        >>> import billhook as bh
        >>> print(bh.Mean("similar"))
        mean, similar heads grouped
    """

    changes_basis: ClassVar[bool] = False

    def render(self, metric: Tensor, moments: Tensor) -> Rendering:
        """Returns B_j = I, P_j = I / J."""
        eye = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device).expand(len(moments), -1, -1)
        return Rendering(eye, eye / len(moments))
