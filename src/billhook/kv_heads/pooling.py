"""Pooling of heads with their optimizer state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from billhook.linalg import Indices
from billhook.model import Change, Shape

Pool = Callable[[Sequence[Tensor]], Tensor]
"""Combines the heads of a group into one."""

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names of the mean or sum of squared gradients in Adam and AdamW, RMSprop and Adadelta, and Adagrad."""


def mean(heads: Sequence[Tensor]) -> Tensor:
    """Returns the mean of heads, summed in float32 or wider.

    >>> mean([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])])
    tensor([1., 3.])
    """
    start, *others = heads
    total = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)
    for head in others:
        total += head
    return (total / len(heads)).to(start.dtype)


def first(heads: Sequence[Tensor]) -> Tensor:
    """Returns the first head."""
    return heads[0]


@dataclass(frozen=True)
class Pooled:
    """The pooling of a parameter.

    Attributes:
        dim: Dimension that holds its heads.
        index: By old position, the position in the new tensor; old positions with equal new ones are pooled.
    """

    dim: int
    index: tuple[int, ...]

    @cached_property
    def counts(self) -> Indices:
        """By new position, the number of old positions: int64."""
        return np.bincount(self.index)

    @cached_property
    def groups(self) -> list[tuple[Indices, Indices]]:
        """New positions with equally many old ones, and these, `[old per new, new]`, in order."""
        order = np.argsort(self.index, kind="stable")
        starts = np.cumsum(self.counts) - self.counts
        groups = []
        for count in np.unique(self.counts).tolist():
            new = np.flatnonzero(self.counts == count)
            groups.append((new, order[starts[new] + np.arange(count)[:, None]]))
        return groups

    def size(self, old: Sequence[int]) -> tuple[int, ...]:
        """Returns the new size of a tensor."""
        return (*old[: self.dim], len(self.counts), *old[self.dim + 1 :])

    def along(self, tensor: Tensor) -> Tensor:
        """Returns the number of old positions by new position, broadcastable to a new tensor."""
        shape = [1] * tensor.ndim
        shape[self.dim] = -1
        return torch.from_numpy(self.counts).to(tensor.device, tensor.dtype).reshape(shape)

    def pool(self, tensor: Tensor, how: Pool = mean) -> Tensor:
        """Returns the new tensor, with old positions that share a new position pooled."""
        new = tensor.new_empty(self.size(tensor.shape))
        for positions, old in self.groups:
            heads = [tensor.index_select(self.dim, head) for head in torch.from_numpy(old).to(tensor.device)]
            pooled = how(heads) if len(heads) > 1 else heads[0]
            new.index_copy_(self.dim, torch.from_numpy(positions).to(tensor.device), pooled.to(tensor.dtype))
        return new

    def spread(self, tensor: Tensor) -> Tensor:
        """Returns a new tensor at the old positions."""
        return tensor.index_select(self.dim, torch.tensor(self.index, device=tensor.device))


Shrunk = tuple[dict[str, Pooled], Shape]
"""Pooling by parameter, and the new shape of the model."""


def pooling(pooled: Pooled, how: Pool) -> Change:
    """Pools a parameter and its state; second moments of G heads are multiplied by G^2."""

    def state(key: str, value: Tensor) -> Tensor:
        new = pooled.pool(value, how)
        power = 2 if key in SECOND_MOMENTS else 1 if key == "exp_inf" else 0
        return new * pooled.along(new) ** power

    return Change(lambda old: pooled.pool(old, how), state)
