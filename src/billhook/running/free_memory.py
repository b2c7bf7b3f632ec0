"""How much memory there is for what is held for a while, such as second moments of all places at once."""

from contextlib import suppress
from pathlib import Path

import torch

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
