"""A model that is larger than its device: blocks are there one at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.state import overridden
from billhook.engine.trees import tree_leaves, tree_map_only


@contextmanager
def offloaded(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Has blocks, none within another, compute on a device: each is there, with its inputs, until another one is called."""
    stay = _Stay(device)
    with ExitStack() as stack:
        stack.callback(stay.leave)
        for block in blocks:
            stack.enter_context(overridden(block, forward=partial(stay.compute, block, block.forward)))
        yield


class _Stay:
    """Who is on the device now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block: nn.Module | None = None
        self.homes: dict[Tensor, torch.device] = {}

    def compute(self, block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a block's forward on the device."""
        if block is not self.block:
            self.leave()
            self.block = block
            self.homes = {tensor: tensor.device for tensor in (*block.parameters(), *block.buffers())}
            for tensor in self.homes:
                tensor.data = tensor.data.to(self.device)
        home = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), self.device)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.to(home), forward(*args, **kwargs))

    def leave(self) -> None:
        """Brings the block back that is there."""
        for tensor, home in self.homes.items():
            tensor.data = tensor.data.to(home)
        torch.clear_autocast_cache()  # which holds, on the device, what was cast of the block
        self.block, self.homes = None, {}
