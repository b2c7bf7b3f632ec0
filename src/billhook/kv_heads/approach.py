"""The heads of a group become equal step by step, while the model trains, so that to pool them then loses nothing."""

from collections.abc import Mapping

import torch
from torch import nn

from billhook.kv_heads.pooling import How, Pooled
from billhook.model.surgery import values_kept


@torch.no_grad()
def approach(model: nn.Module, parameters: Mapping[str, Pooled], share: float, how: How = "mean") -> None:
    """Moves every head towards what its group is pooled to, in place: W <- W + share (pool(W) - W).

    With shares 1/n, 1/(n - 1), ..., 1 the heads of a group are equal after n moves, whatever training does in between: each goes
    an equal part of the way that is then left. Optimizer state stays. If anything fails, nothing has moved.

    Args:
        model: A Hugging Face model.
        parameters: Which parameters hold heads, and how they are pooled, as in a `KVHeadPlan`.
        share: The part of the way, in (0, 1].
        how: To the mean of a group, or to its first head.
    """
    moving = {model.get_parameter(name): pooled for name, pooled in parameters.items()}
    with values_kept(moving):
        for parameter, pooled in moving.items():
            parameter.lerp_(pooled.spread(pooled.pool(parameter, how)), share)
