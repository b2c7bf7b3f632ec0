"""The device of a command, checks of its output files, and its progress bars."""

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn

from billhook.engine import check_device, progress_bars_off, resident, store_of
from billhook.linalg import float64_device
from billhook.progress import OnProgress, progress_bar


def device_of(name: str) -> torch.device:
    """Returns a device by name; "auto" is a working accelerator with float64, or the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else float64_device(accelerator)
    return cast(torch.device, check_device(name, "device"))


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[int]:
    """Sets the number of CPU threads within a `with` block, and yields it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


def machine_name(device: torch.device, threads: int) -> str:
    """Returns a name for the hardware that measures."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def check_file(name: str, file: str | None, suffix: str) -> None:
    """Raises if an output file has the wrong suffix or its folder does not exist."""
    if file is not None and (Path(file).suffix != suffix or not Path(file).absolute().parent.is_dir()):
        raise ValueError(f"{name}='{file}' must be a {suffix} file in an existing folder.")


def write_json(file: str, record: Mapping[str, object]) -> None:
    """Writes results to a JSON file."""
    Path(file).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


@contextmanager
def file_progress(task: str) -> Iterator[None]:
    """Shows one progress bar, instead of transformers' own, while files are read or written."""
    with progress_bars_off(), progress_bar(task):
        yield


@contextmanager
def hide_library_bars() -> Iterator[None]:
    """Hides the progress bars of datasets and transformers within a `with` block."""
    import datasets  # help and errors in options need not wait for it

    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress_bars_off():
            yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


@contextmanager
def model_progress(model: nn.Module, task: str, unit: str) -> Iterator[OnProgress]:
    """Shows the progress of a pass over a model; for a streamed model it counts blocks.

    Args:
        model: The model.
        task: The task, such as "pruning".
        unit: The steps that are counted for a model in memory, such as "linear layers".

    Yields:
        Callback with the number of finished steps and the total.
    """
    if (store := store_of(model)).holds_all:
        with progress_bar(task, unit) as progress:
            yield progress
        return
    with progress_bar(task, "blocks", peak_memory) as progress, store.reporting(progress):
        yield lambda done, total: None


def peak_memory() -> str:
    """Returns the peak memory of this process as text; empty if the system does not count it."""
    peak = resident("VmHWM")
    return "" if peak is None else f"peak {peak / 2**30:.1f} GiB"
