"""The memory of this process, as the system counts it (Linux only)."""

from pathlib import Path
from typing import Literal

STATUS = Path("/proc/self/status")


def resident(which: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int | None:
    """Returns the bytes that the process takes now, or has taken at most (VmHWM); None where nothing counts them."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:")), None)
