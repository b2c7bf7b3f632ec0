"""Forwards of blocks that are not in memory, or not on their device, until they are called."""

from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from billhook.engine.device import DeviceCopies, run_on
from billhook.engine.trees import tree_leaves, tree_map_only


class BlockLoader(Protocol):
    """Loads blocks for their forwards, as a store does."""

    device: torch.device | None

    def load(self, module: nn.Module) -> nn.Module | None:
        """Has the block of a module in memory."""


class LoadingForward:
    """A forward of a block that is in memory by then, or on the device of its store."""

    keeps_shapes = True

    def __init__(self, store: BlockLoader, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.store, self.block, self.forward = store, block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        self.store.load(self.block)
        if self.store.device is not None:
            return run_on(self.store.device, self.forward, args, kwargs)
        return self.forward(*args, **kwargs)


class InferenceForward(LoadingForward):
    """A forward of a block that is there by then; nothing is kept of it for gradients, which are refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        with torch.no_grad():  # or what autograd keeps would hold all blocks
            output = super().__call__(*args, **kwargs)
        return tree_map_only(Tensor, _without_gradient, output)


class OffloadedForward(LoadingForward):
    """A forward of a linear that is in no block, such as the output embedding: copies are on the store's device for each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the linear makes of what it is given."""
        if self.store.device is None:
            return self.forward(*args, **kwargs)
        with closing(DeviceCopies(self.store.device)) as copies:
            copies.enter(self.block)
            return run_on(self.store.device, self.forward, args, kwargs)


class _Refused(torch.autograd.Function):
    """Gives what it is given, and refuses to be differentiated."""

    @staticmethod
    def forward(_: Any, output: Tensor, __: Tensor) -> Tensor:  # noqa: ANN401
        """Returns a view of a tensor."""
        return output.view_as(output)

    @staticmethod
    def backward(*_: object) -> NoReturn:
        """Refuses the gradient."""
        raise ValueError("model: its blocks come one at a time, and gradients need all weights in memory: load it with bh.load")


def _without_gradient(output: Tensor) -> Tensor:
    """Returns what a block gives, so that a gradient that comes to it is refused."""
    if not output.is_floating_point():
        return output
    # a second input that wants a gradient: autograd calls `backward` for it, although the output itself wants none
    refused: Tensor = _Refused.apply(output, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return refused


class TrainingForward(LoadingForward):
    """A forward of a block that is in memory by then, and again when gradients come back to what it has given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Returns what the block makes of what it is given."""
        output = super().__call__(*args, **kwargs)
        for tensor in tree_leaves(output) if torch.is_grad_enabled() else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._back)  # type: ignore[no-untyped-call]
        return output

    def _back(self, _: Tensor) -> None:
        self.store.load(self.block)


class LoadHook:
    """A hook by which the block of a module is in memory before the module computes."""

    keeps_shapes = True

    def __init__(self, load: Callable[[nn.Module], object], block: nn.Module) -> None:
        self.load, self.block = load, block

    def __call__(self, *_: object) -> None:
        """Loads it."""
        self.load(self.block)
