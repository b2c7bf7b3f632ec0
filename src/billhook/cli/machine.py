"""Where a command computes, where it may write its figures, and the bars that it shows."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import datasets
import torch
from torch import nn

from billhook.engine.device import check_device
from billhook.engine.loader_internals import progress_bars_off
from billhook.engine.memory import resident
from billhook.engine.store import store_of
from billhook.linalg import float64_device
from billhook.progress import OnProgress, progress_bar


def device_of(name: str) -> torch.device:
    """Returns the device of a name; for "auto", an accelerator with float64 if there is one and its driver works, or the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else float64_device(accelerator)
    return cast(torch.device, check_device(name, "device"))


@contextmanager
def threads_of(number: int | None) -> Iterator[int]:
    """Sets the threads of the CPU within, and gives how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def machine_name(device: torch.device, threads: int) -> str:
    """Names the machine on which figures were measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def check_file(name: str, file: str | None, suffix: str) -> None:
    """Refuses a file to write that has another ending, or lies in no folder."""
    if file is not None and (Path(file).suffix != suffix or not Path(file).absolute().parent.is_dir()):
        raise ValueError(f"{name}='{file}' must be a file that ends in {suffix}, in a folder that exists")


@contextmanager
def files(what: str) -> Iterator[None]:
    """Shows one bar, and none of transformers' own, while files are read or written."""
    with progress_bars_off(), progress_bar(what):
        yield


@contextmanager
def without_others_bars() -> Iterator[None]:
    """Has `datasets` and transformers show no bars of their own within."""
    shows = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress_bars_off():
            yield
    finally:
        if shows:
            datasets.enable_progress_bars()


@contextmanager
def over(model: nn.Module, what: str, of: str) -> Iterator[OnProgress]:
    """Shows a bar over what a pass over a model tells; of a model that is streamed, over its blocks.

    Args:
        model: The model.
        what: What is done, as in "pruning".
        of: What is counted where the model is in memory, as in "linears".

    Yields:
        A function to call with how much is done, and of how much.
    """
    if (store := store_of(model)).holds_all:
        with progress_bar(what, of) as progress:
            yield progress
        return
    with progress_bar(what, "blocks", peak) as progress, store.watched(progress):
        yield lambda done, total: None


def peak() -> str:
    """Says how much memory the process has taken at most; nothing where no system counts it."""
    most = resident("VmHWM")
    return "" if most is None else f"peak {most / 2**30:.1f} GiB"
