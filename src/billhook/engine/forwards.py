"""Forwards that load their block first."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from billhook.engine.device import DeviceCopies, run_on
from billhook.engine.trees import tree_leaves, tree_map_only


class BlockLoader(Protocol):
    """Loads blocks for their forwards, as a store does."""

    device: torch.device | None

    def load(self, module: nn.Module) -> nn.Module | None:
        """Loads the block of a module."""


@dataclass(eq=False, repr=False)
class LoadingForward:
    """A forward that first loads its block, and runs it on the device of the store."""

    keeps_shapes = True

    store: BlockLoader
    block: nn.Module
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any input
        """Loads the block and returns its output."""
        self.store.load(self.block)
        if self.store.device is not None:
            return run_on(self.store.device, self.forward, args, kwargs)
        return self.forward(*args, **kwargs)


class InferenceForward(LoadingForward):
    """A loading forward without gradients, whose outputs raise on backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any input
        """Loads the block and returns its output."""
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        with torch.no_grad():  # autograd would keep all blocks in memory
            output = super().__call__(*args, **kwargs)
        return tree_map_only(Tensor, _without_gradient, output)


class OffloadedForward(LoadingForward):
    """A forward of a linear layer outside of blocks, copied to the device for each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any input
        """Runs the layer on the device and returns its output."""
        if self.store.device is None:
            return self.forward(*args, **kwargs)
        with closing(DeviceCopies(self.store.device)) as copies:
            copies.enter(self.block)
            return run_on(self.store.device, self.forward, args, kwargs)


class _NoGradient(torch.autograd.Function):
    """Identity that raises on backward."""

    @staticmethod
    def forward(_: Any, output: Tensor, __: Tensor) -> Tensor:  # noqa: ANN401
        return output.view_as(output)

    @staticmethod
    def backward(*_: object) -> NoReturn:
        raise ValueError("model is streamed one block at a time, but gradients need all weights in memory. Load it with bh.load.")


def _without_gradient(output: Tensor) -> Tensor:
    """Returns an output on which backward raises."""
    if not output.is_floating_point():
        return output
    # the second input requires a gradient, so autograd calls `backward` even if the output does not
    refused: Tensor = _NoGradient.apply(output, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return refused


class TrainingForward(LoadingForward):
    """A loading forward that loads its block again for the backward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any input
        """Loads the block and returns its output."""
        output = super().__call__(*args, **kwargs)
        for tensor in tree_leaves(output) if torch.is_grad_enabled() else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._back)  # type: ignore[no-untyped-call]
        return output

    def _back(self, _: Tensor) -> None:
        self.store.load(self.block)


@dataclass(eq=False, repr=False)
class LoadHook:
    """A forward pre-hook that loads the block of a module."""

    keeps_shapes = True

    load: Callable[[nn.Module], object]
    block: nn.Module

    def __call__(self, *_: object) -> None:
        """Loads the block."""
        self.load(self.block)
