"""Where a command computes, and where it may write its figures."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from billhook.engine.device import check_device
from billhook.linalg import float64_device


def device_of(asked: str) -> torch.device:
    """Returns the device of a name; for "auto", an accelerator with float64 if there is one and its driver works, or the CPU."""
    if asked == "auto":
        own = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if own is None else float64_device(own)
    return cast(torch.device, check_device(asked, "device"))


@contextmanager
def threads_of(asked: int | None) -> Iterator[int]:
    """Sets the threads of the CPU within, and gives how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked or before)
    try:
        yield asked or before
    finally:
        torch.set_num_threads(before)


def machine_name(place: torch.device, threads: int) -> str:
    """Names the machine on which figures were measured."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{place.type} ({platform.processor() or platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def check_file(name: str, file: str | None, suffix: str) -> None:
    """Refuses a file to write that has another ending, or lies in no folder."""
    if file is not None and (Path(file).suffix != suffix or not Path(file).absolute().parent.is_dir()):
        raise ValueError(f"{name}='{file}' must be a file that ends in {suffix}, in a folder that exists")
