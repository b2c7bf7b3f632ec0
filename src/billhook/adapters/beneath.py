"""Looks beneath adapters: whether a linear has one, and what it wraps."""

from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from billhook.model.meta import to_meta

MERGE = "merge the adapters first (bh.merge)"


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that PEFT has put adapters on, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is beneath its adapters, on the meta device."""
    shadow = to_meta(model)
    for name, layer in adapted(shadow).items():
        owner, _, attr = name.rpartition(".")
        setattr(shadow.get_submodule(owner), attr, layer.get_base_layer())
    return shadow


def beneath(name: str, layers: Collection[str]) -> str:
    """What a tensor or attribute is called where adapters are on some layers."""
    owner, _, own = name.rpartition(".")
    return f"{owner}.base_layer.{own}" if owner in layers else name
