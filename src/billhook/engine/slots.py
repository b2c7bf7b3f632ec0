"""Parameters by their places in modules."""

from collections.abc import Iterator

from torch import nn

Slot = tuple[nn.Module, str]
"""A module and the name of a parameter in it."""


def parameter_slots(module: nn.Module) -> Iterator[tuple[Slot, nn.Parameter]]:
    """Yields all parameters with their slots. A tied parameter comes with each slot."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield (part, name), parameter
