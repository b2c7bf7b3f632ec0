"""Pooling of heads with their optimizer state, at once or gradually during training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from billhook.engine.sharding import full_tensor, local, reshard, sharded_as
from billhook.engine.state import fresh_autocast_cache, uninterrupted
from billhook.linalg import Indices
from billhook.model.shape import Shape
from billhook.model.surgery import Change

Pool = Callable[[Sequence[Tensor]], Tensor]
"""Combines the heads of a group into one."""

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names of the mean or sum of squared gradients in Adam and AdamW, RMSprop and Adadelta, and Adagrad."""


def mean(heads: Sequence[Tensor]) -> Tensor:
    """Returns the mean of heads, summed in float32 or wider.

    >>> mean([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])])
    tensor([1., 3.])
    """
    total = heads[0].to(torch.promote_types(heads[0].dtype, torch.float32), copy=True)
    for head in heads[1:]:
        total += head
    return (total / len(heads)).to(heads[0].dtype)


def first(heads: Sequence[Tensor]) -> Tensor:
    """Returns the first head."""
    return heads[0]


@dataclass(frozen=True)
class Pooled:
    """The pooling of a parameter.

    Attributes:
        dim: Dimension that holds its heads.
        index: By old position, the position in the new tensor, or -1 if it is dropped; old positions with equal new ones are
            pooled.
    """

    dim: int
    index: tuple[int, ...]
    _by_device: dict[torch.device, tuple[list[tuple[Tensor, list[Tensor]]], Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def counts(self) -> Indices:
        """By new position, the number of old positions: int64."""
        index = np.asarray(self.index)
        return np.bincount(index[index >= 0])

    @cached_property
    def groups(self) -> list[tuple[Indices, Indices]]:
        """New positions with equally many old ones, and these, `[old per new, new]`, in order."""
        index = np.asarray(self.index)
        order, starts = np.argsort(index, kind="stable")[(index < 0).sum() :], np.cumsum(self.counts) - self.counts
        groups = []
        for count in np.unique(self.counts).tolist():
            new = np.flatnonzero(self.counts == count)
            groups.append((new, order[starts[new] + np.arange(count)[:, None]]))
        return groups

    def _on(self, device: torch.device) -> tuple[list[tuple[Tensor, list[Tensor]]], Tensor]:
        """Returns the groups and the index on a device, where they are cached.

        Gradual conversion pools at every step.
        """
        if device not in self._by_device:
            groups = [(torch.from_numpy(new).to(device), list(torch.from_numpy(old).to(device))) for new, old in self.groups]
            self._by_device[device] = groups, torch.tensor(self.index, device=device)
        return self._by_device[device]

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
        for positions, old in self._on(tensor.device)[0]:
            heads = [tensor.index_select(self.dim, head) for head in old]
            pooled = how(heads) if len(heads) > 1 else heads[0]
            new.index_copy_(self.dim, positions, pooled.to(tensor.dtype))
        return new

    def spread(self, tensor: Tensor) -> Tensor:
        """Returns a new tensor at the old positions, with 0 at dropped ones."""
        index = self._on(tensor.device)[1]
        spread = tensor.index_select(self.dim, index.clamp_min(0))
        return spread.index_fill(self.dim, (index < 0).nonzero().flatten(), 0) if min(self.index) < 0 else spread


Shrunk = tuple[dict[str, Pooled], Shape]
"""Pooling by parameter, and the new shape of the model."""


def pooling(pooled: Pooled, how: Pool) -> Change:
    """Pools a parameter and its optimizer state.

    Second moments are multiplied by G^2 for G heads.
    """

    def state(key: str, value: Tensor) -> Tensor:
        new = pooled.pool(value, how)
        power = 2 if key in SECOND_MOMENTS else 1 if key == "exp_inf" else 0
        return new * pooled.along(new) ** power

    return Change(lambda old: pooled.pool(old, how), state)


@torch.no_grad()
def approach(model: nn.Module, parameters: Mapping[str, Pooled], share: float, how: Pool = mean) -> None:
    """Interpolates heads toward their pooled head, in place: W <- W + share (pool(W) - W).

    With shares 1/n, 1/(n - 1), ..., 1 the heads of a group are equal after n moves, whatever training does in between. Optimizer
    state stays. If anything fails, no head has moved.
    """
    reshard(model)  # what a forward has left gathered is held as shards
    moving = {model.get_parameter(name): pooled for name, pooled in parameters.items()}
    targets = [  # all of them, before any head moves
        (local(parameter), local(sharded_as(pooled.spread(pooled.pool(full_tensor(parameter), how)), parameter)))
        for parameter, pooled in moving.items()
    ]
    with fresh_autocast_cache(), uninterrupted():  # nothing waits for the device, as this is part of a training step
        for values, target in targets:
            values.lerp_(target, share)
