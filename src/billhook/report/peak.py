"""Peak memory of a piece of work, above the memory that was in use before."""

from pathlib import Path

import torch
from typing_extensions import Self

from billhook.engine.memory import resident

RESET = Path("/proc/self/clear_refs")


class Peak:
    """Within `with`, follows the memory of a device.

    On CUDA that is torch's allocated memory. On a CPU it is the resident memory of the process, which the system counts (Linux
    only): memory that was freed before, kept by the process and used again is not seen. Then `rise` is by how many bytes the
    peak exceeds the memory in use before; None where nothing counts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rise: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before = resident() if _forget_peak() else None
        else:
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            most = torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM") or 0
            self.rise = max(most - self._before, 0)


def _forget_peak() -> bool:
    """Resets the system's count of this process's peak, and says whether that worked."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True
