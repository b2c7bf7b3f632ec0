"""Tensors of a model that hold no values, or that nothing may change."""

from torch import nn


def check_values(model: nn.Module) -> None:
    """Refuses a model with tensors that have no values yet, or that nothing may change."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"model: {name} has no weights yet (it is on the meta device): load them first")
    check_changeable(model)


def check_changeable(model: nn.Module) -> None:
    """Refuses a model with tensors that nothing may change, as torch makes them in inference mode."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so it can neither be changed nor have a gradient: make or "
                "load the model outside of it"
            )
