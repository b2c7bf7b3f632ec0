"""Has a block come before it computes, as a whole or in part."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Coming:
    """A forward of a block that is there by then."""

    keeps_shapes = True

    def __init__(self, bring: Callable[[nn.Module], object], block: nn.Module, forward: Callable[..., Any]) -> None:
        self.bring, self.block, self.forward = bring, block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        self.bring(self.block)
        return self.forward(*args, **kwargs)


class Before:
    """A hook by which the block of a module is there before the module computes."""

    keeps_shapes = True

    def __init__(self, bring: Callable[[nn.Module], object], block: nn.Module) -> None:
        self.bring, self.block = bring, block

    def __call__(self, *_: object) -> None:
        """Has it come."""
        self.bring(self.block)
