"""Blocks on a device: copies of one's tensors stand in the place of its own there, and those of the next are on their way."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.trees import tree_leaves, tree_map_only

Sent = Mapping[Tensor, Tensor]
"""Copies, by what they are copies of."""


class Copies:
    """Copies of a block's parameters and buffers on a device, in the place of its own, which stay as and where they are.

    On CUDA a thread sends the next block's while this one computes: it copies them to page-locked memory, of which torch keeps
    as much as two blocks need, and from there they go on a stream of their own. Two blocks are on the device at most.

    Args:
        device: The device.
        order: Blocks that are in memory, in the order in which they come; with none, nothing is sent ahead.
    """

    def __init__(self, device: torch.device, order: Sequence[nn.Module] = ()) -> None:
        self.device = device
        self._places = list[tuple[dict[str, Any], str, Tensor, Tensor]]()  # what holds it, its name there, its own, the copy
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True)) if self.sends_ahead(device) else {}
        self._sender = ThreadPoolExecutor(1) if self._after else None
        self._stream = torch.cuda.Stream(device) if self._after and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._coming: tuple[nn.Module, Future[Sent]] | None = None

    @staticmethod
    def sends_ahead(device: torch.device) -> bool:
        """Tells whether the next block goes to a device while another computes there."""
        return device.type == "cuda"

    def enter(self, block: nn.Module) -> None:
        """Puts copies in the place of a block's tensors."""
        copies = {own: _as(own, copy) for own, copy in self._arrived(block).items()}
        for part in block.modules():
            for slots in (vars(part)["_parameters"], vars(part)["_buffers"]):
                for name, own in slots.items():
                    if own is not None:
                        self._places.append((slots, name, own, copies[own]))
                        slots[name] = copies[own]
        following = self._after.get(block, block)
        if self._sender is not None and following is not block:
            left = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
            self._coming = following, self._sender.submit(self._send, _tensors(following), left)

    def leave(self) -> None:
        """Puts a block's own tensors back; what has come in the place of a copy meanwhile stays."""
        for slots, name, own, copy in self._places:
            if slots.get(name) is copy:
                slots[name] = own
        self._places = []
        torch.clear_autocast_cache()  # which holds, on the device, what was cast of the block

    def keep(self) -> None:
        """Gives a block's own tensors the values of copies that have changed; no other is copied back."""
        for slots, name, own, copy in self._places:
            now = slots.get(name)
            if now is copy and not torch.equal(copy, own.to(self.device)):
                own.data.copy_(copy.detach())
            elif now is not None and now is not copy:
                slots[name] = _as(own, now.detach().to(own.device))

    def forget(self) -> None:
        """Lets go of what was sent ahead, as its own has other values now."""
        coming, self._coming = self._coming, None
        if coming is not None:
            wait([coming[1]])

    def close(self) -> None:
        """Has nothing on the device any more."""
        self.leave()
        self.forget()
        if self._sender is not None:
            self._sender.shutdown()

    def _arrived(self, block: nn.Module) -> Sent:
        """Returns copies of a block's tensors: those that were sent ahead or, if they are another's, new ones."""
        if self._coming is None or self._coming[0] is not block:
            self.forget()
            locked = self.device.type == "cuda" and all(own.is_pinned() for own in block.parameters())
            return {own: own.detach().to(self.device, copy=True, non_blocking=locked) for own in _tensors(block)}
        sent, self._coming = self._coming[1].result(), None
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            for copy in sent.values():
                copy.record_stream(now)  # or their memory would be given away while kernels still read it
        return sent

    def _send(self, tensors: Iterable[Tensor], left: torch.cuda.Event | None) -> Sent:
        """Sends tensors, in a thread of its own, once the device has done with the block that they take the place of."""
        if left is None:
            return {own: own.detach().to(self.device, copy=True) for own in tensors}
        left.synchronize()
        with torch.cuda.stream(self._stream):
            return {own: own.detach().pin_memory().to(self.device, non_blocking=True) for own in tensors}


class NextBlock:
    """The tensors of the next block, which a thread reads from files while this one computes on a device.

    On CUDA they lie in page-locked memory, from which they go to the device without a copy between.
    """

    def __init__(self, device: torch.device) -> None:
        self._locked = device.type == "cuda"
        self._reader = ThreadPoolExecutor(1)
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None

    def read(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Begins to read a block."""
        self.forget()
        self._coming = name, self._reader.submit(self._read, read)

    def take(self, name: str) -> dict[str, Tensor] | None:
        """Returns the tensors of a block, once they are there; None if another one was read."""
        coming, self._coming = self._coming, None
        if coming is None:
            return None
        wait([coming[1]])  # also if it is another block's: files are read by one thread at a time
        return coming[1].result() if coming[0] == name else None

    def forget(self, name: str | None = None) -> None:
        """Lets go of what was read, of a block or whatever it is, as that has other tensors now."""
        if self._coming is not None and name in (None, self._coming[0]):
            self.take("")

    def _read(self, read: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() if self._locked else tensor for name, tensor in read().items()}


def _tensors(block: nn.Module) -> list[Tensor]:
    return list(dict.fromkeys((*block.parameters(), *block.buffers())))


def _as(own: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, own.requires_grad) if isinstance(own, nn.Parameter) else copy


def computed_on(device: torch.device, forward: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
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
