"""Blocks on a device: copies of one's tensors stand in the place of its own there, and those of the next are on their way."""

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
    """The tensors that a thread reads or sends for the next block while this block computes, by block."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.pending: tuple[K, Future[T]] | None = None

    def begin(self, block: K, make: Callable[[], T]) -> None:
        """Begins to make what a block needs."""
        self.forget()
        self.pending = block, self._thread.submit(make)

    def take(self, block: K | None) -> T | None:
        """Returns what was made for a block, once it is there; None if it was made for another."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        key, future = pending
        wait([future])  # also if it is another block's: files are read, and memory is locked, by one thread at a time
        return future.result() if key == block else None

    def forget(self, block: K | None = None) -> None:
        """Lets go of what was made for a block, or for any, as that has other tensors now."""
        if self.pending is not None and block in (None, self.pending[0]):
            self.take(None)

    def close(self) -> None:
        """Ends the thread."""
        self.forget()
        self._thread.shutdown()


class DeviceCopies:
    """Copies of a block's parameters and buffers on a device, in the place of its own, which stay as and where they are.

    On CUDA a thread sends the next block's while this one computes: it copies them to page-locked memory, of which torch keeps
    as much as two blocks need, and from there they go on a stream of their own. Two blocks are on the device at most.

    Args:
        device: The device.
        order: Blocks that are in memory, in the order in which they come; with none, nothing is sent ahead.
    """

    def __init__(self, device: torch.device, order: Sequence[nn.Module] = ()) -> None:
        self.device = device
        self._replaced = list[tuple[dict[str, Any], str, Tensor, Tensor]]()  # a module's dictionary, a name in it, original, copy
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True)) if self.prefetches(device) else {}
        self._stream = torch.cuda.Stream(device) if self._after and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.ahead = Prefetcher[nn.Module, dict[Tensor, Tensor]]()

    @staticmethod
    def prefetches(device: torch.device) -> bool:
        """Tells whether the next block goes to a device while another computes there."""
        return device.type == "cuda"

    def enter(self, block: nn.Module) -> None:
        """Puts copies in the place of a block's tensors."""
        copies = {original: _like(original, copy) for original, copy in self._arrived(block).items()}
        for module in block.modules():
            for slots in (vars(module)["_parameters"], vars(module)["_buffers"]):
                for name, original in slots.items():
                    if original is not None:
                        self._replaced.append((slots, name, original, copies[original]))
                        slots[name] = copies[original]
        following = self._after.get(block, block)
        if following is not block:
            # the thread waits until kernels that are queued now have run: the block before frees its memory then
            queued = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
            self.ahead.begin(following, partial(self._send, _tensors(following), queued))

    def leave(self) -> None:
        """Puts a block's own tensors back; what has come in the place of a copy meanwhile stays."""
        for slots, name, original, copy in self._replaced:
            if slots.get(name) is copy:
                slots[name] = original
        self._replaced = []
        torch.clear_autocast_cache()  # which holds, on the device, what was cast of the block

    def keep(self) -> None:
        """Gives a block's own tensors the values of copies that have changed; no other is copied back."""
        for slots, name, original, copy in self._replaced:
            now = slots.get(name)
            if now is copy and not torch.equal(copy, original.to(self.device)):
                original.data.copy_(copy.detach())
            elif now is not None and now is not copy:
                slots[name] = _like(original, now.detach().to(original.device))

    def close(self) -> None:
        """Has nothing on the device any more."""
        self.leave()
        self.ahead.close()

    def _arrived(self, block: nn.Module) -> dict[Tensor, Tensor]:
        """Returns copies of a block's tensors by the originals: those that were sent ahead, or new ones."""
        sent = self.ahead.take(block)
        if sent is None:
            read_pinned = self.device.type == "cuda" and all(parameter.is_pinned() for parameter in block.parameters())
            return {tensor: tensor.detach().to(self.device, copy=True, non_blocking=read_pinned) for tensor in _tensors(block)}
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in sent.values():
                copy.record_stream(current)  # or their memory would be given away while kernels still read it
        return sent

    def _send(self, tensors: Iterable[Tensor], queued: torch.cuda.Event | None) -> dict[Tensor, Tensor]:
        """Sends tensors, in a thread of its own."""
        if queued is None:
            return {tensor: tensor.detach().to(self.device, copy=True) for tensor in tensors}
        queued.synchronize()
        with torch.cuda.stream(self._stream):
            return {tensor: tensor.detach().pin_memory().to(self.device, non_blocking=True) for tensor in tensors}


def read_pinned(read: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Reads tensors, for CUDA into page-locked memory, from which they go to the device without a copy between."""
    return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in read().items()}


def _tensors(block: nn.Module) -> list[Tensor]:
    return list(dict.fromkeys((*block.parameters(), *block.buffers())))


def _like(original: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, original.requires_grad) if isinstance(original, nn.Parameter) else copy


def run_on(device: torch.device, forward: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
    """Calls a forward with what it is given on a device; what it gives goes to where the first tensor was, and rests there."""
    home = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), device)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    return tree_map_only(Tensor, lambda x: x.to(home), forward(*args, **kwargs))


def check_device(offload: str | torch.device | None, name: str = "offload") -> torch.device | None:
    """Returns the device that an argument names."""
    if offload is None:
        return None
    try:
        return torch.empty(0, device=offload).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ValueError(f"{name}={str(offload)!r} is no device here: {str(error).splitlines()[0]}") from None
