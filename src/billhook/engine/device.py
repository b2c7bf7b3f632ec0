"""Runs blocks on a device as copies of their tensors, and prefetches the next block."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from billhook.engine.trees import tree_leaves, tree_map_only

K = TypeVar("K")
T = TypeVar("T")


class Prefetcher(Generic[K, T]):
    """Prepares the tensors of the next block in a thread while the current block runs."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.pending: tuple[K, Future[T]] | None = None

    def begin(self, block: K, make: Callable[[], T]) -> None:
        """Starts preparing the tensors of a block."""
        self.forget()
        self.pending = block, self._thread.submit(make)

    def take(self, block: K | None) -> T | None:
        """Waits for the tensors of a block. None if another block was prepared."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        key, future = pending
        wait([future])  # even for another block: only one thread at a time reads files and pins memory
        return future.result() if key == block else None

    def forget(self, block: K | None = None) -> None:
        """Discards the tensors of a block (default: any), which are out of date."""
        if self.pending is not None and block in (None, self.pending[0]):
            self.take(None)

    def close(self) -> None:
        """Ends the thread."""
        self.forget()
        self._thread.shutdown()


class DeviceCopies:
    """Copies of a block's parameters and buffers on a device, used instead of the originals.

    On CUDA a thread copies the next block while this one runs: first to pinned memory, of which torch caches as much as two
    blocks need, then to the device on a separate stream. At most two blocks are on the device.

    Args:
        device: The device.
        order: Blocks in memory, in the order of their calls. Empty disables prefetching.
    """

    def __init__(self, device: torch.device, order: Sequence[nn.Module] = ()) -> None:
        self.device = device
        self._replaced = list[tuple[dict[str, Any], str, Tensor, Tensor]]()  # a module's dictionary, name, original, copy
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True)) if self.prefetches(device) else {}
        self._stream = torch.cuda.Stream(device) if self._after and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.ahead = Prefetcher[nn.Module, dict[Tensor, Tensor]]()

    @staticmethod
    def prefetches(device: torch.device) -> bool:
        """Returns whether the next block is copied to the device while another runs."""
        return device.type == "cuda"

    def enter(self, block: nn.Module) -> None:
        """Replaces a block's tensors by copies."""
        sent = self.ahead.take(block)
        if sent is None:
            is_pinned = self.device.type == "cuda" and all(parameter.is_pinned() for parameter in block.parameters())
            sent = {tensor: tensor.detach().to(self.device, copy=True, non_blocking=is_pinned) for tensor in _tensors(block)}
        elif self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in sent.values():
                copy.record_stream(current)  # keeps the memory until kernels have read it
        copies = {original: _like(original, copy) for original, copy in sent.items()}
        for module in block.modules():
            for slots in (vars(module)["_parameters"], vars(module)["_buffers"]):
                for name, original in slots.items():
                    if original is not None:
                        self._replaced.append((slots, name, original, copies[original]))
                        slots[name] = copies[original]
        following = self._after.get(block, block)
        if following is not block:
            # the thread waits for the kernels queued now, after which the previous block frees its memory
            queued = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
            self.ahead.begin(following, partial(self._send, _tensors(following), queued))

    def leave(self) -> None:
        """Restores a block's own tensors, except where a copy was replaced."""
        for slots, name, original, copy in self._replaced:
            if slots.get(name) is copy:
                slots[name] = original
        self._replaced = []
        torch.clear_autocast_cache()  # holds casts of the block on the device

    def copy_back(self) -> None:
        """Copies changed values back to the originals."""
        for slots, name, original, copy in self._replaced:
            now = slots.get(name)
            if now is copy and not torch.equal(copy, original.to(self.device)):
                original.data.copy_(copy.detach())
            elif now is not None and now is not copy:
                slots[name] = _like(original, now.detach().to(original.device))

    def close(self) -> None:
        """Releases all copies."""
        self.leave()
        self.ahead.close()

    def _send(self, tensors: Iterable[Tensor], queued: torch.cuda.Event | None) -> dict[Tensor, Tensor]:
        """Copies tensors to the device, in the prefetching thread."""
        if queued is None:
            return {tensor: tensor.detach().to(self.device, copy=True) for tensor in tensors}
        queued.synchronize()
        with torch.cuda.stream(self._stream):
            return {tensor: tensor.detach().pin_memory().to(self.device, non_blocking=True) for tensor in tensors}


def read_pinned(read: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Reads tensors, for CUDA into pinned memory, which copies to the device directly."""
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in read().items()}


def _tensors(block: nn.Module) -> list[Tensor]:
    return list(dict.fromkeys((*block.parameters(), *block.buffers())))


def _like(original: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy


def run_on(device: torch.device, forward: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
    """Runs a forward on a device; outputs return to the device of the first input.

    Args:
        device: The device.
        forward: The forward.
        args: Its arguments.
        kwargs: Its keywords.
    """
    input_device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), device)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    return tree_map_only(Tensor, lambda x: x.to(input_device), forward(*args, **kwargs))


def check_device(offload: str | torch.device | None, name: str = "offload") -> torch.device | None:
    """Returns the device of an argument, or raises."""
    if offload is None:
        return None
    try:
        return torch.empty(0, device=offload).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ValueError(f"{name}={str(offload)!r} is not available: {str(error).splitlines()[0]}") from None
