"""Measures memory: of the process, on the host, and the needs of a streamed model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from billhook.engine.device import DeviceCopies
from billhook.engine.store import BlockStore

STATUS = Path("/proc/self/status")
COPIES = 3  # largest number of copies of a block: old, new, and being written; the next one may be prefetched
WORK = 2**27  # bytes for library workspaces and allocator fragmentation


def resident(which: Literal["VmRSS", "VmHWM", "RssAnon"] = "VmRSS") -> int | None:
    """Returns resident bytes: now, at the peak (VmHWM), or without file pages (RssAnon).

    None if the system does not report it, which Linux does.
    """
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:")), None)


def fits(store: BlockStore, working_bytes: int, activations: int, memory: int) -> bool:
    """Returns whether activations fit into memory beside a block and the memory to work on it.

    Args:
        store: The store of the model.
        working_bytes: Memory to work on a block.
        activations: Bytes of activations.
        memory: Bytes that may be used.

    Raises:
        ValueError: If a single block with that memory does not fit.
    """
    prefetched = store.device is not None and DeviceCopies.prefetches(store.device)
    needed = (resident() or 0) + WORK + (COPIES + prefetched) * streamed_size(store).largest + working_bytes
    if needed > memory:
        raise ValueError(
            f"memory={memory / 2**30:.2f} GiB is too small: streaming one block at a time needs at least "
            f"{needed / 2**30:.2f} GiB. Raise memory."
        )
    return needed + activations <= memory


@dataclass(frozen=True)
class StreamedSize:
    """Sizes of the streamed and resident parts of a model, in bytes of parameters.

    Attributes:
        blocks: Number of streamed blocks.
        bytes: Size of all blocks.
        largest: Size of the largest block.
        stays: Size of the parameters outside of blocks, which stay in memory.
    """

    blocks: int
    bytes: int
    largest: int
    stays: int

    def text(self) -> str:
        """Describes the sizes as text."""
        blocks = f"{self.blocks} blocks of up to {self.largest / 1e6:,.1f} MB, loaded one at a time"
        return f"{blocks} ({self.bytes / 1e6:,.1f} MB in total); {self.stays / 1e6:,.1f} MB stay in memory"


def streamed_size(store: BlockStore) -> StreamedSize:
    """Returns the sizes of the streamed and resident parts of a model."""
    sizes = [_bytes(block) for block in store.blocks.values()]
    total = sum(sizes)
    return StreamedSize(len(sizes), total, max(sizes, default=0), _bytes(store.model) - total)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
