"""How much memory a process takes, how much there is, and how much a streamed model needs."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from billhook.engine.device import DeviceCopies
from billhook.engine.store import BlockStore

STATUS = Path("/proc/self/status")


def resident(which: Literal["VmRSS", "VmHWM", "RssAnon"] = "VmRSS") -> int | None:
    """Returns the bytes that the process takes now, has taken at most (VmHWM) or takes beside pages of files (RssAnon).

    None where nothing counts them: Linux does.
    """
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:")), None)


LEAST = 2**31
"""Bytes that may be taken in any case."""


def memory_to_hold(device: torch.device) -> int:
    """Returns how many bytes may be held on a device at a time: a quarter of what is free, and 2 GiB at least.

    Where ranks work together it is 2 GiB, as all of them have to decide alike.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return LEAST
    with suppress(OSError, ValueError, RuntimeError, NotImplementedError):  # of systems and devices that do not say it
        free = _free_on_host() if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]
        return max(LEAST, free // 4)
    return LEAST


def _free_on_host() -> int:
    """Returns the bytes that this process could still take on Linux, also in a container with a limit of its own."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" is no number: there is no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


COPIES = 3
"""How often a block is there at most: as it was, as it is now, and on its way to a file; the next one may be read meanwhile."""

WORK = 2**27
"""Bytes that libraries keep to compute in, and the allocator in pieces."""


def fits(store: BlockStore, moments: int, activations: int, memory: int) -> bool:
    """Tells whether activations fit into the memory of the process, too, beside a block, as often as it is there, and moments.

    Raises:
        ValueError: If not even a block and moments fit.
    """
    ahead = store.device is not None and DeviceCopies.prefetches(store.device)
    needed = (resident() or 0) + WORK + (COPIES + ahead) * streamed_size(store).largest + moments
    if needed > memory:
        raise ValueError(f"memory={memory / 2**30:.2f} GiB: at least {needed / 2**30:.2f} GiB are needed for one block at a time")
    return needed + activations <= memory


@dataclass(frozen=True)
class StreamedSize:
    """How much of a model comes and goes, and how much stays, in bytes of parameters.

    Attributes:
        blocks: How many blocks come and go.
        bytes: Of all blocks together.
        largest: Of the largest block.
        stays: Of what is in no block.
    """

    blocks: int
    bytes: int
    largest: int
    stays: int

    def text(self) -> str:
        """Says it in words."""
        blocks = f"{self.blocks} blocks of at most {self.largest / 1e6:,.1f} MB, one at a time"
        return f"{blocks}: {self.bytes / 1e6:,.1f} MB in all; {self.stays / 1e6:,.1f} MB stay in memory"


def streamed_size(store: BlockStore) -> StreamedSize:
    """Finds how much of a model comes and goes."""
    sizes = [_bytes(block) for block in store.blocks.values()]
    total = sum(sizes)
    return StreamedSize(len(sizes), total, max(sizes, default=0), _bytes(store.model) - total)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
