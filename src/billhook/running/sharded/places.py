"""Parameters by their places in a module, and whole ones that have no memory until their values come."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Place = tuple[nn.Module, str]
"""A parameter, by a module that has it and its name there."""


def places_of(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    """Yields all parameters of a module, those that are tied at each of their places."""
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                yield (part, name), own


def without_memory(shard: DTensor) -> nn.Parameter:
    """Returns a whole parameter for one that is sharded; it has no memory yet, and must not be read."""
    return nn.Parameter(_empty(shard, torch.device(shard.device_mesh.device_type)), shard.requires_grad)


def free(parameter: nn.Parameter) -> None:
    """Takes the memory of a whole parameter away; what autograd has saved of it lasts until it comes again."""
    storage = parameter.untyped_storage()
    if storage.resizable():
        storage.resize_(0)
    else:  # something else has it, too, such as an array
        parameter.data = _empty(parameter, parameter.device)


def _empty(like: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty(like.shape, dtype=like.dtype, device=device)
    empty.untyped_storage().resize_(0)
    return empty


def has_memory(parameter: nn.Parameter) -> bool:
    """Tells whether the values of a parameter are there."""
    size: int = parameter.untyped_storage().size()
    return size > 0
