"""Finds the Hugging Face model that a module holds."""

from torch import nn
from transformers import PreTrainedModel


def find_transformer(module: nn.Module) -> PreTrainedModel:
    """Finds the Hugging Face model in a module: itself, or the one that it holds (in its attribute `model`, if it has one)."""
    return locate_transformer(module)[1]


def locate_transformer(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """Finds the Hugging Face model in a module, as `find_transformer` does, and its name there."""
    if isinstance(module, PreTrainedModel):
        return "", module
    if (inner := module._modules.get("model")) is not None:
        name, model = locate_transformer(inner)
        return f"model.{name}".rstrip("."), model
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = child
    if len(found) != 1:
        several = f"more than one Hugging Face model: {', '.join(found)}; the one to work on must be its attribute `model`"
        many = several if found else f"no Hugging Face model (PreTrainedModel){_hidden(module)}"
        raise ValueError(f"{type(module).__name__} holds {many}")
    return next(iter(found.items()))


def _hidden(module: nn.Module) -> str:
    """Describes where a model is that is no part of a module to torch."""
    for name, value in vars(module).items():
        kept = value.values() if isinstance(value, dict) and name != "_modules" else value
        if isinstance(kept, list | tuple | type({}.values())) and any(isinstance(one, PreTrainedModel) for one in kept):
            return f" that torch sees: '{name}' has one in a {type(value).__name__}; make it an attribute of its own"
    return ""
