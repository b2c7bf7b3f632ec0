"""Looks beneath adapters: finds them, and the names and modules that they wrap."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.model.adapter_layers import is_adapter
from billhook.model.meta import to_meta

MERGE = "convert the model first and attach adapters then (get_peft_model), or merge the adapters first (bh.merge)"


def adapted(model: nn.Module) -> dict[str, Any]:
    """Finds the layers of a model that PEFT has put adapters on, by name."""
    return {name: module for name, module in model.named_modules() if is_adapter(module)}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model beneath its adapters, to the meta device."""
    shadow = to_meta(model)
    for name, layer in adapted(shadow).items():
        owner, _, attr = name.rpartition(".")
        setattr(shadow.get_submodule(owner), attr, layer.get_base_layer())
    return shadow


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Puts the layers beneath adapters in their places until the end of a `with` block."""
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], own) for name, own in adapted(model).items()
    ]
    try:
        for owner, attribute, layer in places:
            setattr(owner, attribute, layer.get_base_layer())
        yield
    finally:
        for owner, attribute, layer in places:
            setattr(owner, attribute, layer)


def adds_nothing(layer: Any) -> bool:  # noqa: ANN401 - any of PEFT's layers
    """Tells whether a layer has LoRA on it that is as it began, with B = 0."""
    second = getattr(layer, "lora_B", None)
    plain = not len(getattr(layer, "lora_magnitude_vector", ())) and not layer.merged
    return plain and isinstance(second, nn.Module) and not any(bool(own.any()) for own in second.parameters())


def beneath(name: str, layers: Collection[str]) -> str:
    """Renames a tensor or attribute as it is called where adapters are on some layers."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.base_layer.{attribute}" if owner in layers else name
