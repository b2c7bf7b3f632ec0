"""Finds the Hugging Face model in a module, and checks that its tensors can be changed."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from billhook.engine import store_of
from billhook.model.layers import is_linear, is_packed, is_quantized


def find_transformer(module: nn.Module) -> PreTrainedModel:
    """Returns the Hugging Face model in a module: itself, its `model`, or its only model."""
    return locate_transformer(module)[1]


def locate_transformer(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """Returns the Hugging Face model in a module, and its name there."""
    if isinstance(module, PreTrainedModel):
        return "", module
    if (inner := module._modules.get("model")) is not None:
        name, model = locate_transformer(inner)
        return f"model.{name}".rstrip("."), model
    models: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in models):
            models[name] = child
    if len(models) != 1:
        several = f"more than one Hugging Face model ({', '.join(models)}). Assign the model to use to the attribute `model`."
        many = several if models else f"no Hugging Face model (PreTrainedModel){_hidden(module)}"
        raise ValueError(f"{type(module).__name__} contains {many}")
    return next(iter(models.items()))


def _hidden(module: nn.Module) -> str:
    """Describes a model that torch does not see as a submodule."""
    for name, value in vars(module).items():
        items = list(value.values()) if isinstance(value, dict) and name != "_modules" else value
        if isinstance(items, list | tuple) and any(isinstance(item, PreTrainedModel) for item in items):
            return f" that torch sees: '{name}' has one in a {type(value).__name__}. Make it an attribute."
    return ""


def check_values(model: nn.Module, streamed: bool = False) -> None:
    """Raises for a model with tensors that have no values yet, or that cannot be changed.

    Args:
        model: The model.
        streamed: Whether parameters in blocks may be unloaded.
    """
    blocks = store_of(model).blocks.values() if streamed else ()
    unloaded = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and id(tensor) not in unloaded:
            raise ValueError(f"model: {name} has no values (it is on the meta device). Load all weights first.")
    check_changeable(model)


def check_changeable(model: nn.Module) -> None:
    """Raises for inference-mode tensors, which cannot be changed."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: {name} was created under torch.inference_mode and cannot be changed. Create or load the model "
                "outside of inference mode."
            )


def check_stored(model: nn.Module) -> None:
    """Raises for linear layers whose weight is not a parameter."""
    for name, module in model.named_modules():
        if is_linear(module) and module._parameters.get("weight") is None:
            raise ValueError(
                f"the weight of {name} is not a parameter (it is a buffer, or computed, such as by torch.nn.utils.prune or a "
                "parametrization). Make it a parameter first."
            )


def check_dense(model: nn.Module) -> None:
    """Raises for weights in a sparse layout, which torch cannot slice or save."""
    for name, parameter in model.named_parameters():
        if parameter.layout is not torch.strided:
            raise ValueError(f"{name} has the sparse layout {parameter.layout}. Convert it with to_dense() first.")


def check_plain(model: nn.Module, do: str) -> None:
    """Raises for quantized or sharded weights. `do` begins the sentence with the fix."""
    for name, module in model.named_modules():
        if is_packed(module):
            raise ValueError(f"{name} is quantized ({type(module).__name__}). {do} quantized.")
    check_dense(model)
    for name, parameter in model.named_parameters():
        if is_quantized(parameter) and parameter.dtype is not torch.bool:
            raise ValueError(f"{name} is quantized ({parameter.dtype}). {do} quantized.")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over devices. {do} sharded.")
