"""A model that is larger than its device: blocks are there one at a time, and activations rest on disk."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.memory import let_go
from billhook.engine.state import overridden
from billhook.engine.trees import tree_leaves, tree_map_only

SMALL = 2**16
"""Bytes of a tensor that is not worth a file."""


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


class Shelf:
    """Keeps tensors in files of a folder, mapped into memory: the system writes them out when it needs the room."""

    def __init__(self, folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="billhook_", dir=folder, ignore_cleanup_errors=True)
        self._files = 0

    def keep(self, kept: object) -> None:
        """Moves tensors from the memory of the CPU into files, for whoever holds them; parameters and small tensors stay.

        Tensors that share memory share a file, if together they need as much; part of what others may still hold stays.
        """
        for tensors in self._by_memory(kept):
            own = tensors[0].untyped_storage()
            mapped = self.zeros(own.nbytes(), dtype=torch.uint8)
            mapped.copy_(torch.empty(0, dtype=torch.uint8).set_(own))
            let_go(mapped)
            for tensor in tensors:
                empty, place = torch.empty(0, dtype=tensor.dtype), tensor.storage_offset()
                tensor.data = empty.set_(mapped.untyped_storage(), place, tensor.shape, tensor.stride())

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns zeros in a file."""
        self._files += 1
        path = Path(self._folder.name, str(self._files))
        mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        with suppress(OSError):  # where a file that is mapped cannot be removed, closing does it
            path.unlink()
        return mapped.view(shape)

    def close(self) -> None:
        """Removes the folder; what is still mapped stays readable."""
        self._folder.cleanup()

    def _by_memory(self, kept: object) -> list[list[Tensor]]:
        """Returns the tensors that can be moved, those together that share memory; those that lie here already are let go."""
        found = defaultdict[int, dict[int, Tensor]](dict)
        for tensor in _plain(kept):
            memory = tensor.untyped_storage()
            if memory.filename is not None and Path(self._folder.name) in Path(memory.filename).parents:
                let_go(tensor)
            elif memory.filename is None and memory.nbytes() >= SMALL:
                found[memory.data_ptr()][id(tensor)] = tensor
        sharing = [list(own.values()) for own in found.values()]
        return [own for own in sharing if sum(one.nbytes for one in own) >= own[0].untyped_storage().nbytes()]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", files: Shelf | None = None) -> Tensor:
    """Returns zeros on a device, or in a file."""
    return torch.zeros(shape, dtype=dtype, device=device) if files is None else files.zeros(*shape, dtype=dtype)


def _plain(kept: object) -> Iterator[Tensor]:
    """Yields the plain tensors of the CPU in nested containers, each with the one that it is a view of, which it keeps."""
    for leaf in tree_leaves(kept):
        for tensor in (leaf, leaf._base) if isinstance(leaf, Tensor) else ():
            if type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu":
                yield tensor
