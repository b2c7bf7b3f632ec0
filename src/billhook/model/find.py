"""Finds the Hugging Face model that a module holds, and refuses tensors without values, or that nothing may change."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from billhook.engine.store import store_of
from billhook.model.layers import is_linear, is_packed, is_quantized


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
    models: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in models):
            models[name] = child
    if len(models) != 1:
        several = f"more than one Hugging Face model: {', '.join(models)}; the one to work on must be its attribute `model`"
        many = several if models else f"no Hugging Face model (PreTrainedModel){_hidden(module)}"
        raise ValueError(f"{type(module).__name__} holds {many}")
    return next(iter(models.items()))


def _hidden(module: nn.Module) -> str:
    """Describes where a model is that is no part of a module to torch."""
    for name, value in vars(module).items():
        items = list(value.values()) if isinstance(value, dict) and name != "_modules" else value
        if isinstance(items, list | tuple) and any(isinstance(item, PreTrainedModel) for item in items):
            return f" that torch sees: '{name}' has one in a {type(value).__name__}; make it an attribute of its own"
    return ""


def check_values(model: nn.Module, coming: bool = False) -> None:
    """Refuses a model with tensors that have no values yet, or that nothing may change.

    Args:
        model: The model.
        coming: Whether values of a block may be away until it comes.
    """
    blocks = store_of(model).blocks.values() if coming else ()
    away = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and id(tensor) not in away:
            raise ValueError(f"model: {name} has no weights yet (it is on the meta device): load all of them first")
    check_changeable(model)


def check_changeable(model: nn.Module) -> None:
    """Refuses a model with tensors that nothing may change, as torch makes them in inference mode."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so it can neither be changed nor have a gradient: make or "
                "load the model outside of it"
            )


def check_stored(model: nn.Module) -> None:
    """Refuses linears whose weight is no parameter, but computed from others or a buffer."""
    for name, module in model.named_modules():
        if is_linear(module) and module._parameters.get("weight") is None:
            raise ValueError(
                f"the weight of {name} is no parameter (it is computed, as by torch.nn.utils.prune or a parametrization, or a "
                "buffer): make it one first"
            )


def check_dense(model: nn.Module) -> None:
    """Refuses weights that are stored sparse, which torch can neither cut nor save as they are."""
    for name, parameter in model.named_parameters():
        if parameter.layout is not torch.strided:
            raise ValueError(f"{name} is sparse ({parameter.layout}): make it dense first, as by to_dense()")


def check_plain(model: nn.Module, do: str) -> None:
    """Refuses weights that are quantised, or sharded over devices, and says what to do before they are."""
    for name, module in model.named_modules():
        if is_packed(module):
            raise ValueError(f"{name} is quantised ({type(module).__name__}): {do} quantised")
    check_dense(model)
    for name, parameter in model.named_parameters():
        if is_quantized(parameter) and parameter.dtype is not torch.bool:
            raise ValueError(f"{name} is quantised ({parameter.dtype}): {do} quantised")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over devices: {do} sharded")
