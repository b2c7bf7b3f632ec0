"""Heads are pooled: parameters, and the state that optimizers keep of them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from billhook.model.handed import Indices
from billhook.model.surgery import Change

How = Literal["mean", "first"]
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""What Adam and AdamW, RMSprop and Adadelta, and Adagrad call the mean or sum of squared gradients."""


@dataclass(frozen=True)
class Pooled:
    """How one parameter shrinks.

    Attributes:
        dim: The dimension that holds its heads.
        index: For each old position along it, its position in the new tensor; positions that share one are pooled.
    """

    dim: int
    index: tuple[int, ...]

    @cached_property
    def counts(self) -> Indices:
        """For each new position how many old ones it has: int64."""
        return np.bincount(np.asarray(self.index))

    @cached_property
    def rounds(self) -> list[tuple[Indices, Indices]]:
        """The first old position of every new one, the second of those that have one, and so on: old and new positions."""
        index = np.asarray(self.index)
        order = np.argsort(index, kind="stable")
        place = np.arange(len(index)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return [(own := order[place == number], index[own]) for number in range(int(self.counts.max()))]

    def along(self, tensor: Tensor) -> Tensor:
        """The number of old positions of every new one, to be multiplied with a new tensor."""
        shape = [1] * tensor.ndim
        shape[self.dim] = -1
        return torch.from_numpy(self.counts).to(tensor.device, tensor.dtype).reshape(shape)

    def pool(self, tensor: Tensor, how: How = "mean") -> Tensor:
        """The new tensor: the mean, summed in float32 at least, or the first, of the old positions of every new one."""
        size = list(tensor.shape)
        size[self.dim] = len(self.counts)
        wide = tensor.dtype if how == "first" else torch.promote_types(tensor.dtype, torch.float32)
        new = torch.zeros(size, dtype=wide, device=tensor.device)
        for old, then in self.rounds[: 1 if how == "first" else None]:  # no two of a round add to one place, in any order
            part = tensor.index_select(self.dim, torch.from_numpy(old).to(tensor.device)).to(wide)
            new.index_add_(self.dim, torch.from_numpy(then).to(tensor.device), part)
        return new if how == "first" else (new / self.along(new)).to(tensor.dtype)

    def spread(self, tensor: Tensor) -> Tensor:
        """A new tensor at the old positions: what was pooled, repeated."""
        return tensor.index_select(self.dim, torch.tensor(self.index, device=tensor.device))


def pool_heads(tensor: Tensor, before: int, after: int, method: How = "mean", dim: int = 0) -> Tensor:
    """One head for each group of `before / after` consecutive heads along a dimension.

    Args:
        tensor: The heads one after the other along `dim`, `[..., before * width, ...]`.
        before: Heads in `tensor`.
        after: Heads in the result; divides `before`.
        method: `"mean"`: W_group = 1/G * sum over the group of W_head (GQA, section 2.1), summed in float32 at least;
            `"first"`: the first head of the group.
        dim: The dimension that holds the heads.

    Returns:
        `[..., after * width, ...]`, in the dtype of `tensor`.

    >>> pool_heads(torch.tensor([0.0, 1.0, 2.0, 5.0]), before=4, after=2)
    tensor([0.5000, 3.5000])
    """
    position = np.arange(tensor.shape[dim])
    width = len(position) // before
    index = position // width // (before // after) * width + position % width
    return Pooled(dim % tensor.ndim, tuple(index.tolist())).pool(tensor, method)


def pooling(pooled: Pooled, how: How, values: Tensor | None = None) -> Change:
    """Pools a parameter, or other values of it; first moments follow like the weights, and second ones, times G^2."""

    def weight(old: Tensor) -> Tensor:
        return pooled.pool(old if values is None else values.to(old), how)

    def state(key: str, value: Tensor) -> Tensor:
        new = pooled.pool(value, how)
        power = 2 if key in SECOND_MOMENTS else 1 if key == "exp_inf" else 0
        return new * pooled.along(new) ** power

    return Change(weight, state)


def drawing(
    pooled: Pooled, size: tuple[int, ...], std: float, generator: torch.Generator, values: Tensor | None = None
) -> Change:
    """Draws what is pooled anew (biases are zero), and keeps the rest; optimizers begin with zero there."""
    drawn = torch.randn(size, generator=generator) * std if len(size) > 1 else torch.zeros(size)
    lone = [1] * len(size)
    lone[pooled.dim] = -1
    anew = torch.from_numpy(pooled.counts > 1).reshape(lone)

    def weight(old: Tensor) -> Tensor:
        kept = pooled.pool(old if values is None else values.to(old), "first")
        return torch.where(anew.to(old.device), drawn.to(old), kept)

    return Change(weight, lambda _, value: pooled.pool(value, "first").masked_fill(anew.to(value.device), 0))


def taking(values: Tensor) -> Change:
    """Takes other values of the same size; optimizer state stays."""
    return Change(lambda old: values.to(old), lambda _, value: value)


def std_of(config: object, size: tuple[int, ...], dim: int) -> float:
    """The deviation with which a model draws a weight that has its outputs along a dimension; 1 / sqrt(inputs) where unsaid."""
    inputs = math.prod(size) // size[dim]
    usual = float(getattr(config, "initializer_factor", 1.0)) * inputs**-0.5
    said = (getattr(config, name, None) for name in ("initializer_range", "init_std"))
    return float(next((value for value in said if isinstance(value, float | int)), usual))
