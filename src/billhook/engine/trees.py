"""Walks over nested lists and dictionaries, and over parameters of nested modules."""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten"]
ModulesByName = Mapping[str, nn.Module]
Sizes = Mapping[str, tuple[int, ...]]  # of parameters, by name
Slot = tuple[nn.Module, str]  # a module and the name of a parameter in it


def parameter_slots(module: nn.Module) -> Iterator[tuple[Slot, nn.Parameter]]:
    """Yields all parameters with their slots. A tied parameter comes with each slot."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield (part, name), parameter
