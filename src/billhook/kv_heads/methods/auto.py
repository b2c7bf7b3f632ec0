"""The method, and the choice of groups, with which a model stays nearest to itself on held-out batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from billhook.kv_heads.methods.aligned import Aligned
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.methods.mean import Mean
from billhook.kv_heads.methods.svd import SVD
from billhook.kv_heads.pooling import mean


@dataclass(frozen=True)
class Auto(KVMethod):
    """Tries several methods and takes the one whose predictions are nearest to the model's on held-out batches.

    How near is the mean Kullback-Leibler divergence of the logits; of a model without any, the distance of its last states.

    These are the mean, and turns and the low-rank rendering of consecutive and of similar heads, as far as the model allows them;
    a subclass with other `candidates` tries others.

    Example:
        >>> import billhook as bh
        >>> [str(method) for method in bh.Auto().candidates[2:4]]
        ['svd', 'aligned, similar heads grouped']
    """

    least_batches: ClassVar[int] = 2
    has_path: ClassVar[bool] = False
    turns = True
    candidates = (Mean(), Aligned(), SVD(), Aligned("similar"), SVD("similar"))

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean of heads that are equal by then."""
        return mean(heads)
