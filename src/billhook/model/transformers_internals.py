"""Private names of transformers, each in one place; a test asks whether they are still there."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.engine.loader_internals import LOADED
from billhook.model.config_fields import configs_of

ATTENTION = "_attn_implementation_internal"
"""The attribute of a config that holds how attention is computed; to set it asks for no check."""


EXPERTS = "_experts_implementation_internal"
"""The same of experts."""


def attention_of(config: PretrainedConfig) -> str | None:
    """Returns how attention is computed; None where that is not chosen yet."""
    implementation: str | None = getattr(config, ATTENTION, None)
    return implementation


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


def compute_experts_eagerly(model: nn.Module) -> None:
    """Has experts computed by their class's own code, which asks nothing of their sizes."""
    for config in configs_of(model):
        config._experts_implementation = "eager"


def follows_inputs(module: nn.Module, buffer: str) -> bool:
    """Tells whether a module's forwards change a buffer: rotary frequencies of the kinds that follow the length of the inputs."""
    types = getattr(module, "rope_type", None)
    names = map(str, types.values() if isinstance(types, dict) else [types])  # one for each kind of layers
    changes = any("dynamic" in name or name == "longrope" for name in names)
    return changes and buffer.endswith("inv_freq") and "original" not in buffer


def match_implementations(model: nn.Module, other: nn.Module) -> None:
    """Has another model compute attention and experts as a model does, part by part."""
    parts = dict(model.named_modules())
    for name, module in other.named_modules():
        config, stated = (vars(part).get("config") for part in (module, parts.get(name, module)))
        if isinstance(config, PretrainedConfig) and isinstance(stated, PretrainedConfig):
            vars(config).update({key: vars(stated)[key] for key in (ATTENTION, EXPERTS) if key in vars(stated)})


def build_class(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model of a class, with weights; tables in buffers are as loading makes them, in float32 whatever the dtype."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for module in model.modules():
        setattr(module, LOADED, not module._buffers)
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return model


def classes_of(auto: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:  # noqa: ANN401 - an auto class
    """Returns the classes that an auto class may take for a config."""
    classes = auto._model_mapping.get(type(config), ())
    return list(classes) if isinstance(classes, tuple | list) else [classes]
