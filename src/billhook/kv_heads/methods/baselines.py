"""The first head, and heads drawn at random: the ablation of the GQA paper.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
(https://arxiv.org/abs/2305.13245), section 3.3 and figure 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.pooling import Pooled, first, mean, pooling
from billhook.model.surgery import Change


@dataclass(frozen=True)
class First(KVMethod):
    """Keeps the first head of a group."""

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the first head."""
        return first(heads)


@dataclass(frozen=True)
class RandomHeads(KVMethod):
    """Draws one head for those of a group, as the model initialises its weights; biases start at zero, and norms are averaged.

    The optimizer's state of what is drawn starts at zero.

    Args:
        seed: Of the numbers that are drawn.
    """

    seed: int = 0
    has_path: ClassVar[bool] = False
    pools_adapters: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name that messages use."""
        return "random"

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean, of what no linear makes."""
        return mean(heads)

    def changes(self, model: PreTrainedModel, parameters: Mapping[str, Pooled]) -> dict[str, Change]:
        """Returns draws for linears, one after the other from one generator, and means for all else."""
        generator = torch.Generator().manual_seed(self.seed)
        config, found = model.config.get_text_config(decoder=True), dict[str, Change]()
        for name, pooled in parameters.items():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D):
                size = pooled.size(model.get_parameter(name).shape)
                found[name] = drawing(pooled, size, std_of(config, size, pooled.dim), generator)
            else:
                found[name] = pooling(pooled, self.pool)
        return found


def drawing(pooled: Pooled, size: tuple[int, ...], std: float, generator: torch.Generator) -> Change:
    """Draws what is pooled (biases are zero), and keeps the rest; the optimizer's state is zero there."""
    drawn = torch.randn(size, generator=generator) * std if len(size) > 1 else torch.zeros(size)
    several = pooled.along(drawn) > 1

    def weight(old: Tensor) -> Tensor:
        return torch.where(several.to(old.device), drawn.to(old), pooled.pool(old, first))

    return Change(weight, lambda _, value: pooled.pool(value, first).masked_fill(several.to(value.device), 0))


def std_of(config: object, size: tuple[int, ...], dim: int) -> float:
    """Returns the deviation with which a model draws a weight whose outputs lie along `dim`; 1 / sqrt(inputs) if unknown."""
    inputs = math.prod(size) // size[dim]
    usual = float(getattr(config, "initializer_factor", 1.0)) * inputs**-0.5
    stated = (getattr(config, name, None) for name in ("initializer_range", "init_std"))
    return float(next((value for value in stated if isinstance(value, float | int)), usual))
