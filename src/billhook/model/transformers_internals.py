"""Private names of transformers, each in one place; a test asks whether they are still there."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.config_fields import configs_of

ATTENTION = "_attn_implementation_internal"
"""The attribute of a config that holds how attention is computed; to set it asks for no check."""


def attention_of(config: PretrainedConfig) -> str | None:
    """Returns how attention is computed; None where that is not chosen yet."""
    chosen: str | None = getattr(config, ATTENTION, None)
    return chosen


def set_attention(config: PretrainedConfig, implementation: str) -> None:
    """Chooses how attention is computed, also by what the model's class does not name."""
    config._attn_implementation = implementation


def has_sdpa(kind: type[nn.Module]) -> bool:
    """Finds whether the attention of a class of models can be torch's `scaled_dot_product_attention`."""
    return bool(getattr(kind, "_supports_sdpa", False))


def compute_every_expert(model: nn.Module) -> None:
    """Has experts computed in the one way that does not ask how many tokens each is given, which nobody knows on meta."""
    for config in configs_of(model):
        config._experts_implementation = "batched_mm"


def build_class(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model of a class, with weights."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model


def classes_of(auto: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:  # noqa: ANN401 - an auto class
    """Returns the classes that an auto class may take for a config."""
    found = auto._model_mapping.get(type(config), ())
    return list(found) if isinstance(found, tuple | list) else [found]
