"""A model that is larger than its device: blocks are there one at a time, and what modules give lies on disk."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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

    def copy(self, tensor: Tensor) -> Tensor:
        """Copies a tensor of the CPU into a file; one that is small, lies there already or needs gradients is returned itself."""
        plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad and tensor.is_contiguous()
        if not plain or tensor.nbytes < SMALL or self._has(tensor):
            return tensor
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

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

    def _has(self, tensor: Tensor) -> bool:
        filename = tensor.untyped_storage().filename
        return filename is not None and Path(self._folder.name) in Path(filename).parents


@contextmanager
def outputs_in(files: Shelf | None, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Has the outputs of a model's modules lie in files, where runs that rest within the model hold them; None leaves them.

    A copy in a file goes on in the place of each output. What else a module's code computes stays in memory, and so does what is
    computed within `blocks`, in which no run rests.
    """
    if files is None:
        yield
        return
    with ExitStack() as stack:
        inside = {module for block in blocks for module in block.modules() if module is not block}
        for module in model.modules():
            if module in inside:
                continue
            hook = module.register_forward_hook(lambda _module, _inputs, outputs: tree_map_only(Tensor, files.copy, outputs))
            stack.callback(hook.remove)
        yield


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", files: Shelf | None = None) -> Tensor:
    """Returns zeros on a device, or in a file."""
    return torch.zeros(shape, dtype=dtype, device=device) if files is None else files.zeros(*shape, dtype=dtype)
