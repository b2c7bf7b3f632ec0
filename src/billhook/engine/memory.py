"""How much memory a process takes, how much there is, and how much a streamed model needs."""

import ctypes
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.files import Stream, stream_of

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3
"""In glibc's malloc.h."""
VARIABLE = "BILLHOOK_RELEASE_MEMORY"
"""The environment variable that switches on what calls the C library past torch: `mallopt` and `madvise`; off unless it is 1."""


def resident(which: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int | None:
    """Returns the bytes that the process takes now, or has taken at most (VmHWM); None where nothing counts them."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:")), None)


def give_back(kind: str = "cpu") -> None:
    """Has the CPU's allocator give memory that it keeps in pieces, for later, back to the system, where it can (glibc).

    Nothing happens where work is done on a device of another `kind`, whose allocator keeps its memory for the next piece.
    """
    if kind != "cpu":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """Has the allocator take pieces of a mebibyte or more from the system one by one, and give each back at once (glibc).

    Nothing happens unless `BILLHOOK_RELEASE_MEMORY` is 1: it changes the allocator of the whole process.
    """
    if not _is_switched_on():
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def let_go(tensor: Tensor) -> None:
    """Lets the pages of a tensor that lies in a file go from the process, whole ones; they come again when they are read.

    Nothing happens unless `BILLHOOK_RELEASE_MEMORY` is 1: the system then takes them when it needs the room.
    """
    if not _is_switched_on():
        return
    with suppress(OSError, AttributeError):
        if tensor.untyped_storage().filename is not None:
            first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - first
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _is_switched_on() -> bool:
    return os.environ.get(VARIABLE) == "1"


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
"""How often a block is there at most: as it was, as it is now, and on its way to a file."""

WORK = 2**27
"""Bytes that libraries keep to compute in, and the allocator in pieces."""


def fits(model: PreTrainedModel, sums: int, refit: int, rests: int, memory: int) -> bool:
    """Tells whether all that may rest in files fits into the memory of the process beside all else.

    Args:
        model: The model; it is streamed.
        sums: Bytes of the largest statistics, with what is made of them, and of what runs compute at once.
        refit: Bytes that a linear is refitted in while its block stays as it is; 0 where none is.
        rests: Bytes of what may rest in files.
        memory: Bytes that the process may take.

    Raises:
        ValueError: If not even all else fits.
    """
    stream = stream_of(model)
    assert stream is not None, "the model is in memory"
    block = extent_of(stream).largest
    needed = (resident() or 0) + WORK + max(COPIES * block + sums, block + refit)
    if needed > memory:
        raise ValueError(f"memory={memory / 2**30:.2f} GiB: at least {needed / 2**30:.2f} GiB are needed for one block at a time")
    return needed + rests <= memory


@dataclass(frozen=True)
class Extent:
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


def extent_of(stream: Stream) -> Extent:
    """Finds how much of a model comes and goes."""
    sizes = [_bytes(block) for block in stream.blocks.values()]
    total = sum(sizes)
    return Extent(len(sizes), total, max(sizes, default=0), _bytes(stream.model) - total)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
