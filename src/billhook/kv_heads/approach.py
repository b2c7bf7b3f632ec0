"""The heads of a group become equal step by step, while the model trains, so that pooling them then loses nothing."""

from collections.abc import Mapping

import torch
from torch import nn

from billhook.kv_heads.pooling import Pool, Pooled, mean
from billhook.model.surgery import values_kept


@torch.no_grad()
def approach(model: nn.Module, parameters: Mapping[str, Pooled], share: float, how: Pool = mean) -> None:
    """Moves every head towards what its group is pooled to, in place: W <- W + share (pool(W) - W).

    With shares 1/n, 1/(n - 1), ..., 1 the heads of a group are equal after n moves, whatever training does in between: each moves
    an equal part of the remaining way. Optimizer state stays. If anything fails, nothing has moved.

    Args:
        model: A Hugging Face model.
        parameters: Which parameters hold heads, and where, as in a `KVHeadPlan`.
        share: The part of the way, in (0, 1].
        how: How the heads of a group are pooled.
    """
    moving = {model.get_parameter(name): pooled for name, pooled in parameters.items()}
    with values_kept(moving):
        for parameter, pooled in moving.items():
            parameter.lerp_(pooled.spread(pooled.pool(parameter, how)), share)
