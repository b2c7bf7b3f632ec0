"""The most memory that a piece of work takes above what was taken before it."""

from pathlib import Path
from typing import Self

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Within `with`, follows the memory of a device.

    On CUDA it is what torch has allocated there. On a CPU it is what the process has resident, which the system counts (Linux
    only): memory that was freed before and not yet given back, and is taken anew, is missing from it.

    Attributes:
        rise: Bytes by which the most that was taken exceeds what was taken before; None where nothing counts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rise: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before = _resident("VmRSS") if _forget_peak() else None
        else:
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            most = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
            self.rise = max(most - self._before, 0)


def _forget_peak() -> bool:
    """Makes the system count this process's peak anew; whether it does."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
