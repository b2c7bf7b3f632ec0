"""Where float64 can be computed with: GPUs of Apple, and some of Intel, have none."""

from functools import cache

import torch


def float64_device(device: torch.device | str) -> torch.device:
    """Returns the device if it has float64, and otherwise the CPU: float32 would be too inaccurate for what is solved."""
    device = torch.device(device)
    return device if _has_float64(device) else torch.device("cpu")


def widest_float(device: torch.device | str) -> torch.dtype:
    """Returns float64, or float32 for a device without it: for sums that go on to where float64 is, and single numbers."""
    return torch.float64 if _has_float64(torch.device(device)) else torch.float32


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type in ("cpu", "meta", "cuda"):
        return True
    try:
        torch.ones(2, device=device).to(torch.float64).sum().item()
    except (TypeError, RuntimeError):
        return False
    return True
