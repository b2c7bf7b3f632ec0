"""Heads turned so that they agree, and then their mean: generalised Procrustes analysis.

Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966 (https://doi.org/10.1007/BF02289451);
Gower, "Generalized Procrustes analysis", 1975 (https://doi.org/10.1007/BF02291478).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kv_heads.methods.base import Rendered, Rendering

ROUNDS = 100
"""How often, at most, all heads are turned."""


@dataclass(frozen=True)
class Aligned(Rendered):
    """Turns each head so that all of a group agree as far as turns can make them, and takes their mean.

    Queries and outputs are turned along, so that the turns alone change nothing in the model. Without batches, the weights alone
    say which turns. Sought are unitary R_j with the least sum over j of E||R_j k_j - m||^2, m = 1/J sum over j of R_j k_j. As
    turns keep lengths, that is sum over j of E||k_j||^2 - J E||m||^2: the mean is to be as large as it can. J^2 E||m||^2 is the
    sum over i and j of tr(R_i E[k_i k_j^H] R_j^H), in which one head's turn has a part of 2 Re tr(M_j R_j^H), M_j = sum over
    i != j of R_i E[k_i k_j^H]; with the singular value decomposition M_j = U s V^H the unitary matrix that makes it largest is
    R_j = U V^H (Schönemann). The heads are turned one after another until none moves (Gower): the mean never shrinks, so the
    result is no worse than without turns. kbar = m, so P_j = R_j / J, and B_j = R_j^H.

    Args:
        grouping: Which heads share a group: `"consecutive"`, those next to each other, or `"similar"`, those that can be turned
            nearest to each other; query heads then change places along with them.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> bh.convert_kv_heads(model, 2, bh.Aligned()).after
        2
    """

    def render(self, metric: Tensor, moments: Tensor) -> Rendering:
        """Returns the turns; who reads the heads makes no difference."""
        count, width = moments.shape[:2]
        turns = torch.eye(width, dtype=moments.dtype, device=moments.device).repeat(count, 1, 1)
        for _ in range(ROUNDS if count > 1 else 0):
            before = turns.clone()
            for head in range(count):
                others = [i for i in range(count) if i != head]
                left, _, right = torch.linalg.svd(torch.einsum("iab,ibc->ac", turns[others], moments[others, :, head]))
                turns[head] = left @ right
            if (turns - before).abs().max() < 1e-9:
                break
        return Rendering(turns.mH, turns / count)
