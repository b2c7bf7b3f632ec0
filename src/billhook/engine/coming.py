"""Has a block come before it computes, as a whole or in part."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.trees import tree_leaves


class Coming:
    """A forward of a block that is there by then."""

    keeps_shapes = True

    def __init__(self, bring: Callable[[nn.Module], object], block: nn.Module, forward: Callable[..., Any]) -> None:
        self.bring, self.block, self.forward = bring, block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        self.bring(self.block)
        return self.forward(*args, **kwargs)


class ComingAgain(Coming):
    """A forward of a block that is there by then, and again when gradients come back to what it has given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        given = super().__call__(*args, **kwargs)
        for one in tree_leaves(given) if torch.is_grad_enabled() else ():
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(self._back)  # type: ignore[no-untyped-call]
        return given

    def _back(self, _: Tensor) -> None:
        self.bring(self.block)


class Before:
    """A hook by which the block of a module is there before the module computes."""

    keeps_shapes = True

    def __init__(self, bring: Callable[[nn.Module], object], block: nn.Module) -> None:
        self.bring, self.block = bring, block

    def __call__(self, *_: object) -> None:
        """Has it come."""
        self.bring(self.block)
