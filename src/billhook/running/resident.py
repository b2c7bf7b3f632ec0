"""The memory of this process, as the system counts it (Linux only)."""

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from torch import Tensor

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
