"""Has a block come before it computes, and refuses the gradients that come back to it."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from billhook.running.coming import Coming
from billhook.running.trees import tree_map_only


class ComingOnce(Coming):
    """A forward of a block that is there by then; nothing is kept of it for gradients, which are refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        with torch.no_grad():  # or what autograd keeps would hold all blocks
            found = super().__call__(*args, **kwargs)
        return tree_map_only(Tensor, _without_gradient, found)


class _Refused(torch.autograd.Function):
    """Gives what it is given, and refuses to be differentiated."""

    @staticmethod
    def forward(_: Any, output: Tensor, __: Tensor) -> Tensor:  # noqa: ANN401
        """Returns a view of a tensor."""
        return output.view_as(output)

    @staticmethod
    def backward(*_: object) -> NoReturn:
        """Refuses the gradient."""
        raise ValueError("model: it is streamed, and gradients need all weights in memory: load it with bh.load")


def _without_gradient(output: Tensor) -> Tensor:
    """Returns what a block gives, so that a gradient that comes to it is refused."""
    found: Tensor = output
    if output.is_floating_point():
        found = _Refused.apply(output, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return found
